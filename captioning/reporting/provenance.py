"""Where the results come from.

Two kinds are kept apart. What follows from the inputs (params, digests of the stages' outs) is the same after every
rerun. What belongs to one run alone (git revision, machine, stage times, health) stands in marked parts of
index.html, between `RUN_BEGIN` and `RUN_END`. So index.html is the only out whose digest another run may change
(drawing the report alone again does not), and `without_run` gives the bytes that must not change.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning import paths

RUN_BEGIN, RUN_END = "<!-- this run: begin -->", "<!-- this run: end -->"
LOCK = Path("dvc.lock")


def without_run(page: str) -> str:
    """index.html less the parts that belong to one run; equal for equal inputs."""
    return re.sub(f"{re.escape(RUN_BEGIN)}.*?{re.escape(RUN_END)}", "", page, flags=re.DOTALL)


@dataclass(frozen=True)
class StageOut:
    """What dvc.lock records of one out."""

    stage: str
    path: str
    digest: str
    num_bytes: int | None
    num_files: int | None


def stage_names(encoders: Sequence[str], decoders: Sequence[str]) -> list[str]:
    """Every stage of dvc.yaml before `report`, in the order of the flow."""
    pairs = [paths.captioner_name(encoder, decoder) for encoder in encoders for decoder in decoders]
    return [
        "download", "prepare", *(f"features@{encoder}" for encoder in encoders), *(f"train@{pair}" for pair in pairs),
        *(f"generate@{pair}" for pair in pairs), "blip", *(f"score@{name}" for name in [*pairs, "blip"]),
    ]  # fmt: skip


def read_lock(stages: Sequence[str], lock: Path = LOCK) -> list[StageOut]:
    """The outs of the named stages; empty where dvc.lock is absent or a kill left it unparsable.

    dvc.lock is no dep of the report (it holds the report itself), so nothing may fail on it.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        recorded = (YAML(typ="safe", pure=True).load(lock) or {}).get("stages") or {}
        return [
            StageOut(name, out["path"], out.get("md5") or out.get("hash", ""), out.get("size"), out.get("nfiles"))
            for name in stages
            for out in (recorded.get(name) or {}).get("outs", [])
        ]
    except (OSError, YAMLError, AttributeError, KeyError, TypeError, UnicodeDecodeError):
        return []


@dataclass(frozen=True)
class Run:
    """One run of the pipeline, on one machine, at one time."""

    revision: str | None
    """Git's commit at HEAD; None outside a repository."""
    changed: bool
    """Whether tracked files besides results differ from that commit."""
    committed: str | None
    """Date of that commit. Not the date of the report: then a report drawn again would differ for nothing."""
    machine: list[tuple[str, str]]
    seconds: dict[str, float]
    """Stage → duration of its last run here; stages that DVC skipped keep their last."""


def record_run(stages: Sequence[str]) -> Run:
    """Collects what only this run knows; what cannot be found out is left empty, never an error."""
    revision = _git("rev-parse", "HEAD")
    # Results change while DVC runs; only a change to what they are made from is news.
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock", ":!reports")
    committed = _git("show", "--no-patch", "--format=%cs", "HEAD")
    times = _read_times(paths.work_root() / "times.json")
    machine = [
        ("system", f"{platform.system()} {platform.machine()}"),
        ("CPU cores", str(os.cpu_count())),
        ("Python", platform.python_version()),
        *_package_versions(("torch", "dvc", "numpy")),
    ]
    return Run(revision, bool(changes), committed, machine, {name: times[name] for name in stages if name in times})


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _read_times(path: Path) -> dict[str, float]:
    try:
        tree: Any = json.loads(path.read_text("utf-8"))
        return {str(name): float(value) for name, value in tree.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _package_versions(names: Sequence[str]) -> list[tuple[str, str]]:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in names:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return found


def format_seconds(seconds: float) -> str:
    """`0.8 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_bytes(num_bytes: int | None) -> str:
    """`512 B`, `1.4 MB`: decimal units."""
    if num_bytes is None:
        return ""
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
