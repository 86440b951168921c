"""How much work a kill may cost, and how much it did cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from faults.survey import CHECKPOINT_STEPS, TARGETS, base

UNITS_UNDER_WAY = {"download": 2, "features*2": 2, "generate*2": 2}
"""Shards or parts that are in work at once, where it is not one: those of each process."""
MAIN = ("stage", "rank0")

Trace = list[dict[str, Any]]


class Life:
    """What one process of a training run has not saved, followed through its trace and its checkpoint writer's.

    A save is due after the interval, and begins when the writer has finished the one before and the step under way has
    noticed that. So a kill costs the interval, or the steps made while the writer was busy and one or two more where
    those are longer, and the steps made since the last save began, if the writer had not finished that. Here a step
    takes a few milliseconds and a commit's fsyncs a hundred, which is why the writer's part is counted and not bounded.
    """

    SLACK = 2
    """The step in which the writer finished, and the step under way."""

    def __init__(self) -> None:
        self.busy = 0
        """Steps after the committed state that were made before the writer was free again."""
        self.unsaved = 0
        """Steps after the committed state."""
        self.begun: int | None = None
        """`unsaved` when the first save that is not committed began."""
        self.latest = 0
        """`unsaved` when the latest did."""

    def step(self) -> None:
        self.unsaved += 1

    def begin_save(self) -> None:
        self.begun = self.unsaved if self.begun is None else self.begun
        self.latest = self.unsaved

    def writer_acts(self, committed: bool) -> None:
        if committed and self.begun is not None:
            self.unsaved, self.begun = self.unsaved - self.latest, None
        if self.begun is None:
            self.busy = self.unsaved

    @property
    def allowed(self) -> int:
        in_flight = 0 if self.begun is None else self.unsaved - self.begun
        return max(CHECKPOINT_STEPS, self.busy + self.SLACK) + in_flight


def lives(stage: str, trace: Trace) -> list[Life]:
    """One for each process that trained, in the order of their first steps."""
    found: dict[int, Life] = {}
    current = Life()
    for event in [event for event in trace if event["stage"] == TARGETS[base(stage)]]:
        path, is_main = Path(event["path"]), event["role"] in MAIN
        if is_main and event["call"] == "step":
            current = found.setdefault(event["pid"], Life())
            current.step()
        elif is_main and event["call"] == "mkdir" and path.name == "checkpoints":
            current.begin_save()
        elif event["role"] == "writer":  # its fsync of the folder comes after its rename
            current.writer_acts(event["call"] == "fsync" and path.name == "checkpoints")
    return list(found.values())


def allowed_units(stage: str, trace: Trace, num_runs: int, num_damaged: int) -> int:
    """Units that may be redone after so many runs that were broken off; damaged checkpoints are not counted here."""
    if base(stage) in ("train", "blip"):
        return sum(life.allowed for life in lives(stage, trace)[:-1])
    return UNITS_UNDER_WAY.get(stage, 1) * num_runs + num_damaged


def newest_step(work: Path, damaged: list[Path] | None = None) -> int:
    """Of the checkpoints below a stage's work folder, without those with a damaged file; 0: there is none."""
    bad = {path.parent for path in damaged or []}
    folders = [path for path in work.rglob("step-*") if path.is_dir() and path.name[5:].isdigit() and path not in bad]
    return max((int(path.name[5:]) for path in folders), default=0)
