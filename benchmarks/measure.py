"""Timing in turn: A B A B, so that a machine that slows down slows both."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""One benchmark: work, times (name → median_s, min_s, max_s), ratios and check (name → number or text)."""


def in_turn(works: dict[str, Callable[[], object]], repeats: int, warm: bool = False) -> dict[str, dict[str, float]]:
    """Runs each work once to warm up (unless the caller did: `warm`), then all of them in turn, `repeats` times.

    Returns:
        For each name the median, minimum and maximum in seconds.
    """
    for work in works.values() if not warm else ():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    return {
        name: {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values)}
        for name, values in seconds.items()
    }


def ratio(times: dict[str, dict[str, float]], slower: str, faster: str) -> float:
    """How many times longer `slower` takes than `faster`, by medians."""
    return times[slower]["median_s"] / times[faster]["median_s"]


def read_rows(file: Path) -> dict[str, Any]:
    """What was measured before, by name."""
    rows: dict[str, Any] = json.loads(file.read_text())["results"] if file.exists() else {}
    return rows


def keep_row(file: Path, name: str, found: dict[str, Any], order: Iterable[str]) -> None:
    """Writes a row with its date and machine beside those that are there, which stay as they are: after each one, so
    that a benchmark that is stopped keeps what it has."""
    rows = read_rows(file) | {name: {**found, "date": datetime.date.today().isoformat(), "machine": machine()}}
    file.write_text(json.dumps({"results": {known: rows[known] for known in order if known in rows}}, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """Processor, cores and versions."""
    import torch

    model = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "h5py")},
    }


def show(row: Row) -> None:
    """Prints a benchmark as lines."""
    print(row["work"], flush=True)
    for name, found in row["times"].items():
        spread = f"{found['min_s'] * 1000:.1f} to {found['max_s'] * 1000:.1f}"
        print(f"  {name:42} {found['median_s'] * 1000:9.1f} ms  ({spread})")
    for name, value in {**row["ratios"], **row["check"]}.items():
        print(f"  {name:46} {value:.3g}" if isinstance(value, float) else f"  {name:46} {value}", flush=True)
