"""What to do to a run: the fixed list of named cases, and random ones drawn from what the surveys saw."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from faults.damage import KINDS
from faults.survey import WHOLE, Event, Survey, is_unit

Fault = dict[str, Any]
"""For `inject/sitecustomize.py`: role, when, call, number, action and what the action needs."""

SHARES = {
    "train": 24, "download": 12, "features": 11, "blip": 11, "generate": 9, "score": 6, "prepare": 5, "report": 4,
    "train*2": 5, "features*2": 3, "generate*2": 2, "train*live": 5, "generate*live": 2, "train*options": 6,
    "train*compiled": 2, "download*web": 3, WHOLE: 5,
}  # fmt: skip
KILLS = {signal.SIGKILL: 8, signal.SIGTERM: 1, signal.SIGINT: 1}
TARGETS = {"stage": 4, "dvc": 3, "group": 3, "worker": 2, "writer": 2, "java": 1, "rank0": 3, "rank1": 3}
UNSEEN = {"score": {"java"}, "features": {"worker"}}
"""Processes that write no file themselves."""
PLANS = {"point": 30, "moment": 30, "dvc": 8, "error": 10, "tear": 8, "slow": 3, "damage": 8, "change": 4, "lock": 4}
CHANGES: dict[str, dict[str, Any]] = {
    "download": {"download": {"jpeg_quality": 90}},
    "features": {"features": {"batch_size": 3}},
    "train": {"decoder_settings": {"lstm": {"dropout": 0.1}}},
    "blip": {"blip": {"small": {"learning_rate": 0.002}}},
    "generate": {"generate": {"length_penalty": 0.5}},
    "score": {"score": {"metrics": ["Bleu_4"]}},
}
LOCKS = (".dvc/tmp/rwlock", "dvc.lock")


@dataclass(frozen=True)
class Case:
    """Faults for one run after another, then damage to what they left, before `dvc repro` must recover."""

    stage: str
    name: str
    runs: tuple[tuple[Fault, ...], ...]
    """The first run's last fault must come about; a later run may be over before its own."""
    damage: tuple[str, str] | None = None
    """Which pieces of work, and how: `damage.damage_work`."""
    changed: bool = False
    """A param is changed, `dvc repro` run, and the param changed back."""
    lock: str | None = None
    """A file of DVC's that is emptied or cut."""

    @property
    def hits_dvc(self) -> bool:
        """Whether DVC's own files may be torn, which `make repro` mends before it calls dvc."""
        faults = [fault for run in self.runs for fault in run]
        hit = {fault["role"] for fault in faults} | {fault.get("target") for fault in faults}
        return self.lock is not None or bool(hit & {"dvc", "group"})


def _choose(draw: random.Random, weights: dict[Any, int]) -> Any:
    return draw.choices(list(weights), list(weights.values()))[0]


def _at(event: Event, when: str, **action: Any) -> Fault:
    return {
        "role": event.role,
        "stage": event.stage,
        "when": when,
        "call": event.call,
        "number": event.number,
        **action,
    }


def _where(event: Event, when: str) -> str:
    name = f" ({PurePath(event.path).name})" if event.path else ""
    return f"{when} {event.role}'s {event.call} #{event.number}{name}"


def pick(events: Sequence[Event], draw: random.Random) -> Event:
    """Role, then call, then event, each evenly: rare operations come as often as common ones."""
    for key in ("role", "call"):
        chosen = draw.choice(sorted({getattr(event, key) for event in events}))
        events = [event for event in events if getattr(event, key) == chosen]
    return draw.choice(events)


def own_events(survey: Survey) -> list[Event]:
    """Those of the stage and its children, not of dvc."""
    return [event for event in survey.events if event.role != "dvc"]


def kill_at(event: Event, when: str) -> tuple[str, Fault]:
    return f"SIGKILL {_where(event, when)}", _at(event, when, action="kill", signal=int(signal.SIGKILL))


def kill_from_outside(event: Event, target: str, number: signal.Signals, delay_s: float) -> tuple[str, Fault]:
    """The harness kills `target` after `event`; without delay, the process that did it stands still meanwhile."""
    moment = f"{1000 * delay_s:.0f} ms " if delay_s else ""
    fault = _at(event, "after", action="tell", target=target, signal=int(number), delay_s=delay_s)
    return f"{number.name} to {target} {moment}{_where(event, 'after')}", fault


def _random_moment(survey: Survey, draw: random.Random, plain: bool = False) -> tuple[str, Fault]:
    event = pick(own_events(survey), draw)
    roles = {e.role for e in survey.events} | {"stage", "dvc", "group"} | UNSEEN.get(survey.stage, set())
    targets = {name: share for name, share in TARGETS.items() if name in roles}
    target = _choose(draw, targets)
    number = signal.SIGKILL if plain else _choose(draw, KILLS)
    return kill_from_outside(event, target, number, round(draw.uniform(0, max(event.gap_s, 0.02)), 4))


def _random_fault(kind: str, survey: Survey, draw: random.Random) -> tuple[str, Fault]:
    when = draw.choice(["before", "after"])
    if kind == "moment":
        return _random_moment(survey, draw)
    if kind == "dvc":
        return kill_at(pick([e for e in survey.events if e.role == "dvc"], draw), when)
    events = own_events(survey)
    if kind == "error":
        event = pick([e for e in events if e.call not in ("step", "print", "unlink", "rmdir")], draw)
        error, for_ever = draw.choice(["ENOSPC", "EIO", "EROFS"]), draw.random() < 0.5
        calls = ["open", "fsync", "replace", "rename", "mkdir", "link"]
        fault = _at(event, "before", action="fail", error=error, for_ever=for_ever, calls=calls)
        return f"{error} {'for ever from' if for_ever else 'once at'} {_where(event, 'before')[7:]}", fault
    if kind == "tear":
        event = pick([e for e in events if e.call == "open"], draw)
        size = _size_of(event, events)
        action, num_bytes = draw.choice(["tear", "full"]), draw.randrange(max(size, 2))
        what = "killed while writing" if action == "tear" else "disk full"
        return f"{what} at byte {num_bytes} {_where(event, 'after')}", _at(
            event, "after", action=action, num_bytes=num_bytes
        )
    return kill_at(pick(events, draw), when)


def _size_of(opened: Event, events: Sequence[Event]) -> int:
    """What the file had grown to when it was renamed; 4096 where it never was."""
    return next((e.num_bytes for e in events if e.path == opened.path and e.num_bytes), 4096)


def draw_case(surveys: dict[str, Survey], seed: int, number: int, attempt: int = 0) -> Case:
    """Case `number` of a seed; the next attempt where a case's fault did not come about."""
    draw = random.Random(f"{seed} {number} {attempt}")
    stage = _choose(draw, {name: share for name, share in SHARES.items() if name in surveys or name == WHOLE})
    survey = (
        surveys[draw.choice([name for name in sorted(surveys) if "*" not in name])]
        if stage == WHOLE
        else surveys[stage]
    )
    plans = {kind: share for kind, share in PLANS.items() if kind not in _impossible(stage)}
    kind = _choose(draw, plans)
    if stage == WHOLE:
        name, fault = _random_moment(survey, draw, plain=True)
        return Case(stage, f"in {survey.stage}: {name}", ((fault,),))
    if kind in ("damage", "change"):
        name, fault = _late_kill(survey, draw)
        if kind == "change":
            return Case(stage, f"{name}; a param changed and reverted", ((fault,),), changed=True)
        which, how = draw.choice(["newest", "newest", "newest two", "all", "swapped"]), draw.choice(KINDS)
        text = f"{name}; {which} swapped" if which == "swapped" else f"{name}; {which} {how}"
        return Case(stage, text, ((fault,),), damage=(which, how))
    if kind == "lock":
        name, fault = _random_moment(survey, draw, plain=True)
        lock = draw.choice(LOCKS)
        return Case(stage, f"{name}; {lock} emptied or cut", ((fault,),), lock=lock)
    if kind == "slow":
        slow = _at(draw.choice(own_events(survey)), "before", action="sleep", seconds=0.05, calls=["fsync", "replace"])
        name, fault = _random_moment(survey, draw, plain=True)
        return Case(stage, f"slow disk; {name}", ((slow, fault),))
    name, fault = _random_fault(kind, survey, draw)
    if draw.random() < 0.2:
        second, again = _random_moment(survey, draw, plain=True)
        return Case(stage, f"{name}; then {second}", ((fault,), (again,)))
    return Case(stage, name, ((fault,),))


def _impossible(stage: str) -> set[str]:
    """Plans that make no sense for a stage: there is no work to damage, or no change would leave other stages alone."""
    return {"damage", "change"} if stage in ("prepare", "report") else set()


def work_marks(survey: Survey) -> list[int]:
    """Where, among the stage's own events, pieces of its work are done: steps, or renames of pieces in `.work`."""
    events = own_events(survey)
    return [
        number
        for number, event in enumerate(events)
        if event.call == "step" or (event.call == "replace" and is_unit(survey.stage, event.path))
    ]


def _late_kill(survey: Survey, draw: random.Random) -> tuple[str, Fault]:
    """A kill of all processes (a worker alone would be replaced) when some work is done and some is not."""
    events, marks = own_events(survey), work_marks(survey)
    first, last = (marks[len(marks) // 3], marks[-1]) if marks else (0, len(events) - 1)
    return kill_from_outside(draw.choice(events[first : last + 1]), "group", signal.SIGKILL, 0)
