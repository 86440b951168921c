"""The named cases that every run of the matrix begins with, whatever COUNT and SEED."""

from __future__ import annotations

import signal
from collections.abc import Callable

from faults.cases import Case, kill_at, kill_from_outside, own_events, work_marks
from faults.survey import TARGETS, WHOLE, Event, Survey

STRUCK = {
    "train*2": ("stage", "rank0", "rank1", "writer", "group", "dvc"),  # `stage` is torchrun's agent here
    "features*2": ("stage", "rank0", "rank1"),
    "generate*2": ("rank1",),
    "train*live": ("stage", "writer", "group", "dvc"),
    "generate*live": ("stage",),
    "train*options": ("stage", "writer", "group", "dvc"),
    "train*compiled": ("stage", "group"),
    "download*web": ("worker", "stage", "group"),
}
"""Who is killed when half of a variant's work is done."""
WHOLE_TOO = set(TARGETS)


def fixed_cases(surveys: dict[str, Survey]) -> list[Case]:
    """For each stage: a kill as it publishes, and of dvc before it writes its lock; then what only some stages have."""
    cases = []
    for stage in [stage for stage in TARGETS if stage in surveys]:
        cases += _publishing(surveys[stage])
    for stage in [stage for stage in ("download", "features", "train", "generate", "blip") if stage in surveys]:
        cases += _with_work(surveys[stage])
    for lock in (".dvc/tmp/rwlock", "dvc.lock"):
        name, fault = _whole_group(surveys["features"])
        cases.append(Case("features", f"{name}; {lock} emptied or cut", ((fault,),), lock=lock))
    for stage, targets in STRUCK.items():
        for target in targets if stage in surveys else ():
            name, fault = kill_from_outside(_event_at(surveys[stage]), target, signal.SIGKILL, 0)
            cases.append(Case(stage, name, ((fault,),)))
    if "train*options" in surveys:  # among its self-critical epochs, which are the last
        name, fault = kill_from_outside(_event_at(surveys["train*options"], 0.9), "group", signal.SIGKILL, 0)
        cases.append(Case("train*options", name, ((fault,),)))
    for stage in [stage for stage in ("train", "score") if WHOLE_TOO <= set(surveys)]:
        name, fault = _whole_group(surveys[stage])
        cases.append(Case(WHOLE, f"in {stage}: {name}", ((fault,),)))
    return cases


def _last(survey: Survey, wanted: Callable[[Event], bool]) -> Event | None:
    return next((event for event in reversed(survey.events) if wanted(event)), None)


def _publishing(survey: Survey) -> list[Case]:
    cases = []
    published = _last(survey, lambda e: e.role == "stage" and e.call == "replace" and "times" not in e.path)
    if published:
        for when in ("before", "after"):
            name, fault = kill_at(published, when)
            cases.append(Case(survey.stage, name, ((fault,),)))
    locked = _last(survey, lambda e: e.role == "dvc" and e.call == "open" and e.path == "dvc.lock")
    if locked:
        name, fault = kill_at(locked, "before")
        cases.append(Case(survey.stage, name, ((fault,),)))
    return cases


def _event_at(survey: Survey, share: float = 0.5) -> Event:
    """What is done when about that share of the work is."""
    events = own_events(survey)
    marks = work_marks(survey) or list(range(len(events)))
    return events[marks[int(len(marks) * share)]]


def _whole_group(survey: Survey) -> tuple[str, dict]:
    return kill_from_outside(_event_at(survey), "group", signal.SIGKILL, 0)


def _with_work(survey: Survey) -> list[Case]:
    middle, stage = _event_at(survey), survey.stage
    cases = []
    for target, number in (("dvc", signal.SIGKILL), ("group", signal.SIGKILL), ("stage", signal.SIGTERM)):
        name, fault = kill_from_outside(middle, target, number, 0)
        cases.append(Case(stage, name, ((fault,),)))
    name, fault = _whole_group(survey)
    for which in ("newest", "all"):
        cases.append(Case(stage, f"{name}; {which} flip", ((fault,),), damage=(which, "flip")))
    return cases
