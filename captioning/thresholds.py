"""Thresholds of the section `monitoring` in params.yaml, and when a sample passes one of them.

Only plumbing: what stands here changes no result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captioning.params import MonitoringParams

MARGIN = 0.1
"""A value must come back by this share of its threshold before the alert is cleared."""


@dataclass(frozen=True)
class Limit:
    """A threshold that a value must not pass."""

    kind: str
    threshold: float
    is_minimum: bool
    sustained_s: float
    """A breach counts once it has lasted this long: 0 for at once."""
    text: str
    """The breach in words, with a place for `value`."""

    def broken_by(self, value: float) -> bool:
        return value < self.threshold if self.is_minimum else value > self.threshold

    def safe(self, value: float) -> bool:
        """Far enough on the good side for the alert to be cleared."""
        edge = self.threshold * (1 + MARGIN if self.is_minimum else 1 - MARGIN)
        return value >= edge if self.is_minimum else value <= edge


class Guard:
    """Watches one limit, with hysteresis: between two alerts there is always a clear."""

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self._alerted = False
        self._broken_since: float | None = None

    def check(self, value: float | None, now: float) -> str | None:
        """`alert`, `clear`, or None for no news. A value of None (not known, does not apply) begins the wait anew."""
        if value is None or not self.limit.broken_by(value):
            self._broken_since = None
            if self._alerted and value is not None and self.limit.safe(value):
                self._alerted = False
                return "clear"
            return None
        self._broken_since = now if self._broken_since is None else self._broken_since
        if self._alerted or now - self._broken_since < self.limit.sustained_s:
            return None
        self._alerted = True
        return "alert"


def build_limits(settings: MonitoringParams) -> list[Limit]:
    """A limit for each threshold that is not null."""
    wait = settings.sustained_s
    rows: list[tuple[str, str, bool, float, str, str]] = [
        ("disk_low", "min_disk_free_gb", True, 0,
         "disk free {value:.1f} GB is below", "make room, or checkpoints cannot be saved"),
        ("ram_high", "max_ram_percent", False, 0,
         "memory is {value:.0f} % full, above", "the kernel may kill the stage; lower num_workers or batch_size"),
        ("gpu_memory_high", "max_gpu_memory_percent", False, 0,
         "GPU memory is {value:.0f} % full, above", "a larger batch may not fit; lower batch_size"),
        ("gpu_idle", "min_gpu_percent", True, wait,
         f"GPU load {{value:.0f}} %, for {wait:.0f} s below", "is it waiting for data or for another process?"),
        ("gpu_hot", "max_temperature_c", False, 0,
         "GPU at {value:.0f} °C is above", "it may slow itself down; look at its cooling"),
        ("loader_bound", "max_loader_percent", False, wait,
         f"the stage waits for data {{value:.0f}} % of the time, for {wait:.0f} s above", "is the disk slow or busy?"),
    ]  # fmt: skip
    return [
        Limit(kind, threshold, is_minimum, sustained_s, f"{words} monitoring.{name} ({threshold:g}): {advice}")
        for kind, name, is_minimum, sustained_s, words, advice in rows
        if (threshold := getattr(settings, name)) is not None
    ]


def measure(kind: str, record: dict[str, Any]) -> float | None:
    """The value of a sample that a limit of this kind is compared with; None where the machine does not tell."""
    gpus = record.get("gpu", ())
    if kind == "disk_low":
        return record["disk_free"] / 1e9 if "disk_free" in record else None
    if kind == "ram_high":
        return 100 * record["ram_used"] / record["ram_total"] if record.get("ram_total") else None
    if kind == "loader_bound":
        share = record["loader_wait_share"]
        return None if share is None else 100 * share
    if kind == "gpu_memory_high":
        return max((100 * g["memory_used"] / g["memory_total"] for g in gpus if g["memory_total"]), default=None)
    name = {"gpu_idle": "util", "gpu_hot": "temperature"}[kind]
    return max((gpu[name] for gpu in gpus if gpu[name] is not None), default=None)
