"""One case from beginning to end, and the oracle: what must be true when `dvc repro` has recovered."""

from __future__ import annotations

import random
import re
import shutil
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from clone import Clone, stages_run

from faults import web
from faults.cases import CHANGES, Case, Fault
from faults.damage import damage_work
from faults.processes import Outcome, Run, orphans, processes_of, stop
from faults.redone import allowed_units, newest_step
from faults.survey import (
    TARGETS,
    WEB,
    WHOLE,
    Survey,
    base,
    count_units,
    load_lock,
    prepare_case,
    read_trace,
    repro_targets,
    snapshot,
    template_of,
    variant,
)


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
    """A template's results, which each of its cases must come back to."""

    folder: Path
    lock: dict[str, Any]
    files: dict[str, str]

    @classmethod
    def read(cls, folder: Path, name: str = "") -> Reference:
        """Of the template in the state's `folder`; `name`: its variant."""
        template = Clone(template_of(folder, name))
        return cls(folder, load_lock(template), snapshot(template))


class CaseRun:
    """A case in its own clone in `folder`."""

    def __init__(self, reference: Reference, surveys: dict[str, Survey], case: Case, folder: Path) -> None:
        self.reference, self.surveys, self.case, self.folder = reference, surveys, case, folder
        stop(processes_of(folder / "clone"), signal.SIGKILL)  # of a harness that was stopped
        shutil.rmtree(folder, ignore_errors=True)
        self.clone = prepare_case(reference.folder, folder / "clone", case.stage)
        self.targets = repro_targets(case.stage)
        self.outcomes: list[Outcome] = []
        self.traces: list[dict[str, Any]] = []
        self.num_damaged = self.steps_damaged = 0
        self.must_be_told = False
        self.result = Result(case.name)

    def run(self) -> Result:
        """Faults, recovery, oracle.

        Raises:
            Missed: the case's fault did not come about.
        """
        with web.EXCLUSIVE if variant(self.case.stage) == WEB else nullcontext():
            return self._run()

    def _run(self) -> Result:
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
            work = self.clone.path / ".work" / base(self.case.stage)
            newest = newest_step(work)
            changed = damage_work(work, *self.case.damage, draw) if work.exists() else []
            which, how = self.case.damage
            # A bit that no reader reads may differ: parquet's rows are verified, not its padding.
            harmful = [path for path in changed if path.suffix != ".parquet"]
            self.must_be_told = which != "swapped" and how != "deleted" and bool(harmful)
            self.num_damaged, self.steps_damaged = len(changed), newest - newest_step(work, changed)
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
        self.clone.set(CHANGES[base(self.case.stage)])
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
        stages = [*TARGETS] if self.case.stage == WHOLE else [self.case.stage]
        self.result.redone = sum(self._redone(stage) for stage in stages)
        allowed = sum(self._allowed(stage) for stage in stages)
        if self.result.redone > allowed and self.targets == repro_targets(self.case.stage):
            problems.append(f"{self.result.redone} units of work redone, at most {allowed} allowed")
        told = re.search("damaged|corrupt|set aside", self.outcomes[-2].output) if len(self.outcomes) > 1 else None
        if self.must_be_told and not told:
            problems.append("the damage was not reported")

    def _redone(self, stage: str) -> int:
        return max(count_units(stage, self.traces) - self.surveys[stage].num_units, 0)

    def _allowed(self, stage: str) -> int:
        """Units that may be redone: for every run that was broken off, and for what was damaged."""
        return allowed_units(stage, self.traces, len(self.case.runs), self.num_damaged) + self.steps_damaged


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
