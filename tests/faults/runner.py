"""One case from beginning to end, and the oracle: what must be true when `dvc repro` has recovered."""

from __future__ import annotations

import random
import re
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from clone import Clone, stages_run

from faults.cases import CHANGES, Case, Fault
from faults.damage import damage_work
from faults.processes import Outcome, Run, orphans, processes_of, stop
from faults.survey import (
    CHECKPOINT_STEPS,
    TARGETS,
    WHOLE,
    Survey,
    count_units,
    load_lock,
    prepare_case,
    read_trace,
    repro_targets,
    snapshot,
)

# Units that one kill may cost. Steps: an interval that is not saved yet, another while the writer is at work on the one
# before, and the step under way. Shards: one a worker process.
COSTS = {"train": 2 * CHECKPOINT_STEPS + 1, "blip": 2 * CHECKPOINT_STEPS + 1, "download": 2}


class Missed(Exception):
    """The fault did not come about (the process was quicker, or the target was not there): draw another."""


@dataclass
class Result:
    """What became of a case."""

    name: str
    problems: list[str] = field(default_factory=list)
    redone: int = 0
    attempts: int = 1


@dataclass(frozen=True)
class Reference:
    """The template's results, which each case must come back to."""

    folder: Path
    lock: dict[str, Any]
    files: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> Reference:
        template = Clone(folder / "template")
        return cls(folder, load_lock(template), snapshot(template))


class CaseRun:
    """A case in its own clone in `folder`."""

    def __init__(self, reference: Reference, surveys: dict[str, Survey], case: Case, folder: Path) -> None:
        self.reference, self.surveys, self.case, self.folder = reference, surveys, case, folder
        stop(processes_of(folder / "clone"), signal.SIGKILL)  # of a harness that was stopped
        shutil.rmtree(folder, ignore_errors=True)
        self.clone = prepare_case(reference.folder / "template", folder / "clone", case.stage)
        self.targets = repro_targets(case.stage)
        self.outcomes: list[Outcome] = []
        self.traces: list[dict[str, Any]] = []
        self.num_damaged = 0
        self.result = Result(case.name)

    def run(self) -> Result:
        """Faults, recovery, oracle.

        Raises:
            Missed: the case's fault did not come about.
        """
        for number, faults in enumerate(self.case.runs):
            outcome = self._repro(f"{number + 1}", faults)
            if outcome.code is None:
                self.result.problems.append(f"run {number + 1} hung")
            if not number and len(faults) - 1 not in outcome.fired:
                raise Missed
        self._spoil()
        if self.case.changed:
            self._change_and_revert()
        self._recover()
        self._judge()
        return self.result

    def _repro(self, name: str, faults: Sequence[Fault] = (), counted: bool = True) -> Outcome:
        run = Run(self.clone, self.folder / f"run-{name}", self.targets, list(faults))
        self.outcomes.append(run.wait())
        if counted:
            self.traces += read_trace(run.folder)
        return self.outcomes[-1]

    def _spoil(self) -> None:
        draw = random.Random(self.case.name)
        if self.case.damage:
            orphans(self.clone.path)  # what still saves would mend the damage
            work = self.clone.path / ".work" / self.case.stage
            self.num_damaged = len(damage_work(work, *self.case.damage, draw)) if work.exists() else 0
            if not self.num_damaged:
                raise Missed
        if self.case.lock:
            path = self.clone.path / self.case.lock
            content = path.read_bytes() if path.exists() else b""
            path.write_bytes(content[: draw.choice([0, len(content) // 2, max(len(content) - 5, 0)])])
            if self.case.lock == "dvc.lock":
                self.targets = []  # what is left may parse and lack other stages, which then run again

    def _change_and_revert(self) -> None:
        params = self.clone.path / "params.yaml"
        before = params.read_bytes()
        self.clone.set(CHANGES[self.case.stage])
        if self._repro("changed", counted=False).code != 0:
            self.result.problems.append("`dvc repro` with a changed param failed")
        params.write_bytes(before)

    def _recover(self) -> None:
        if self.case.hits_dvc and can_heal():
            self.clone.run("python", "-m", "captioning", "heal")  # as `make repro` does
        outcome = self._repro("recovery")
        if outcome.code != 0:
            what = "hung" if outcome.code is None else f"exited {outcome.code}"
            self.result.problems.append(f"`dvc repro` {what} instead of recovering")
            return
        again = self._repro("again")
        if again.code != 0 or stages_run(again.output):
            self.result.problems.append(f"a second `dvc repro` was not idle: exit {again.code}")

    def _judge(self) -> None:
        problems = self.result.problems
        problems += [f"still running: {line}" for line in orphans(self.clone.path)]
        if problems:
            return
        problems += _differences("dvc.lock: stage", self.reference.lock, load_lock(self.clone))
        problems += _differences("file", self.reference.files, snapshot(self.clone))
        problems += [f"temporary file left: {path}" for path in sorted((self.clone.path / ".work").rglob("*.tmp"))]
        stages = TARGETS if self.case.stage == WHOLE else [self.case.stage]
        self.result.redone = sum(self._redone(stage) for stage in stages)
        allowed = self._allowed()
        if allowed is not None and self.result.redone > allowed:
            problems.append(f"{self.result.redone} units of work redone, at most {allowed} allowed")
        told = re.search("damaged|corrupt|set aside", self.outcomes[-2].output) if len(self.outcomes) > 1 else None
        if self.case.damage and self.case.damage[0] != "swapped" and self.case.damage[1] != "deleted" and not told:
            problems.append("the damage was not reported")

    def _redone(self, stage: str) -> int:
        return max(count_units(stage, self.traces) - self.surveys[stage].num_units, 0)

    def _allowed(self) -> int | None:
        """Units that may be redone: for every run that was broken off, and every damaged piece. None: no bound."""
        if self.case.stage == WHOLE:
            return max(COSTS.values())  # one stage was hit
        if (self.case.damage and self.case.damage[0] == "all") or self.case.lock == "dvc.lock":
            return None
        cost = COSTS.get(self.case.stage, 1)
        return cost * (len(self.case.runs) + self.num_damaged)


def _differences(what: str, expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    names = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    kinds = {
        name: "missing" if name not in found else "too much" if name not in expected else "differs" for name in names
    }
    return [f"{what} {name} {kind}" for name, kind in kinds.items()][:5]


@cache
def can_heal() -> bool:
    """Whether `python -m captioning heal` exists."""
    from captioning.cli import build_parser

    return "heal" in build_parser().format_help()
