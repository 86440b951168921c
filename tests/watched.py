"""Settings and waiting for tests of health monitoring."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from captioning import health_records
from captioning.params import MonitoringParams

DEFAULTS = MonitoringParams(
    interval_s=2, min_disk_free_gb=2, max_ram_percent=95, max_gpu_memory_percent=98, min_gpu_percent=10,
    max_temperature_c=88, max_loader_percent=50, sustained_s=120, loss_not_finite=True, notify_urls=[], max_file_mb=8,
)  # fmt: skip
THRESHOLDS = [
    name for name in MonitoringParams.model_fields if name.startswith(("min_", "max_")) and "file" not in name
]
# The machine that runs the tests may be short of something itself.
FAST = DEFAULTS.model_copy(update=dict.fromkeys(THRESHOLDS) | {"interval_s": 0.1})
DISK_FULL = FAST.model_copy(update={"min_disk_free_gb": 1e9})


WHOLE = {"util": 37, "memory_used": 40, "memory_total": 100, "temperature": 61, "power_w": 251.2}
SLICE = {"util": None, "memory_used": 99, "memory_total": 100, "temperature": None, "power_w": None}
"""A GPU that tells all, and one that tells its memory alone."""


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def wait_until(happened: Callable[[], object], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.01)


def samples(folder: Path, stage: str = "train@a-b") -> list[dict[str, Any]]:
    return [r for r in health_records.read(folder / f"{stage}.jsonl") if r["kind"] == "sample"]
