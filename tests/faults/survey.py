"""The template: a tiny clone after an uninterrupted run, and what each stage did to files meanwhile.

Cases are copies of the template without one stage's results (or without all), so no case waits for another's stages.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clone import LSTM, ROOT, Clone, stages_run
from ruamel.yaml import YAML

from captioning.reporting.provenance import without_run
from faults.processes import Run

WHOLE = "pipeline"
TARGETS = {
    "download": "download",
    "prepare": "prepare",
    "features": "features@efficientnet_lite0",
    "train": f"train@{LSTM}",
    "generate": f"generate@{LSTM}",
    "blip": "blip",
    "score": f"score@{LSTM}",
    "report": "report",
}
SETTINGS: dict[str, Any] = {
    "download": {"samples_per_shard": 8},
    "features": {"batch_size": 4},
    "decoders": ["lstm"],
    "train": {"num_epochs": 5, "batch_size": 4},
    "generate": {"batch_size": 2},
    "blip": {"batch_size": 4, "small": {"num_epochs": 3}},
    "score": {"metrics": ["Bleu_4", "METEOR", "CIDEr"]},
}
"""Over `clone.TINY`: many small pieces of work, so that there is something to resume."""
CHECKPOINT_STEPS = 2
UNITS = {"download": r"/shards/.*\.tar\b", "features": r"\.h5\b", "generate": r"\.jsonl\b", "score": r"\.jsonl\b"}
"""Pieces of work that are finished by renaming a file in `.work`, by stage; in train and blip they are steps."""


@dataclass(frozen=True)
class Event:
    """One operation of an uninterrupted run: `call` number `number` of one process of that role."""

    role: str
    stage: str
    """DVC's name of it; empty in dvc itself."""
    call: str
    number: int
    path: str
    num_bytes: int
    """Of the file that was renamed."""
    gap_s: float
    """Until the next event of that process."""


@dataclass(frozen=True)
class Survey:
    """What a stage did, by `dvc repro -s`."""

    stage: str
    events: list[Event]
    num_units: int


def read_trace(folder: Path) -> list[dict[str, Any]]:
    """Operations in the order they happened; a line cut short by a kill is left out."""
    events = []
    path = folder / "trace.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def count_units(stage: str, trace: list[dict[str, Any]]) -> int:
    """Pieces of a stage's work done: optimizer steps, or files committed in `.work`."""
    trace = [event for event in trace if event["stage"] == TARGETS.get(stage)]
    if stage in ("train", "blip"):
        return sum(event["call"] == "step" and event["role"] in ("stage", "rank0") for event in trace)
    return sum(event["call"] == "replace" and is_unit(stage, event["path"]) for event in trace)


def is_unit(stage: str, path: str) -> bool:
    """Whether the renamed file is a finished piece of a stage's work."""
    return path.startswith(".work/") and stage in UNITS and bool(re.search(UNITS[stage], path))


def _events(trace: list[dict[str, Any]]) -> list[Event]:
    following: dict[int, float] = {}
    found = []
    for event in reversed(trace):
        gap = following.get(event["pid"], event["time"]) - event["time"]
        following[event["pid"]] = event["time"]
        size = event.get("num_bytes", 0)
        names = [event[name] for name in ("role", "stage", "call", "number", "path")]
        found.append(Event(*names, size, round(gap, 4)))
    return found[::-1]


def make_template(folder: Path, stages: Sequence[str] = tuple(TARGETS)) -> None:
    """Runs the stages, each alone and traced, in `folder/template`, and writes `folder/survey.json`."""
    shutil.rmtree(folder, ignore_errors=True)
    clone = Clone.make(folder / "template")
    clone.set(SETTINGS | _recovery())
    surveys = []
    for stage, target in _with_what_they_need(stages).items():
        print(f"template: {target}", flush=True)
        run = Run(clone, folder / "template-runs" / target, ["-s", target], [])
        outcome = run.wait()
        if outcome.code != 0:
            raise SystemExit(f"the uninterrupted run of {target} failed:\n{outcome.output[-3000:]}")
        trace = read_trace(run.folder)
        surveys.append(Survey(stage, _events(trace), count_units(stage, trace)))
    if set(stages) == set(TARGETS):
        assert not (ran := stages_run(clone.dvc("repro"))), f"{ran} ran again after every stage had run"
    clone.commit("run")
    for name in (".work", ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(clone.path / name, ignore_errors=True)
    (folder / "survey.json").write_text(json.dumps([asdict(survey) for survey in surveys]))


def _recovery() -> dict[str, Any]:
    """Checkpoints every few steps, where params.yaml has that section."""
    params = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    return {"recovery": {"checkpoint_steps": CHECKPOINT_STEPS}} if "recovery" in params else {}


def _with_what_they_need(stages: Sequence[str]) -> dict[str, str]:
    targets: dict[str, str] = {}
    for stage in stages:
        if stage == "report":
            targets["score-blip"] = "score-blip"
        targets[stage] = TARGETS[stage]
    return targets


def load_surveys(folder: Path) -> dict[str, Survey]:
    """Surveys by stage, as `make_template` wrote them."""
    found = {}
    for tree in json.loads((folder / "survey.json").read_text()):
        tree["events"] = [Event(**event) for event in tree["events"]]
        found[tree["stage"]] = Survey(**tree)
    return found


def load_lock(clone: Clone) -> dict[str, Any]:
    """dvc.lock less what one run alone owns: the digest and size of index.html."""
    tree = YAML(typ="safe", pure=True).load(clone.path / "dvc.lock")["stages"]
    for out in tree.get("report", {}).get("outs", []):
        if out["path"] == "reports/index.html":
            out.pop("md5"), out.pop("size")
    return tree


def snapshot(clone: Clone) -> dict[str, str]:
    """sha256 of every file of a clone besides git's, DVC's and Python's own, dvc.lock and work in progress."""
    digests = {}
    for path in sorted(clone.path.rglob("*")):
        name = path.relative_to(clone.path).as_posix()
        if name.split("/")[0] in (".git", ".dvc", ".work", "dvc.lock") or "__pycache__" in name or path.is_dir():
            continue
        content = path.read_bytes()
        if name == "reports/index.html":
            content = without_run(content.decode()).encode()
        digests[name] = hashlib.sha256(content).hexdigest()
    return digests


def prepare_case(template: Path, path: Path, stage: str) -> Clone:
    """A copy of the template that has not run `stage` yet (WHOLE: nothing yet), committed as such."""
    clone = Clone(template).copy(path)
    yaml = YAML()
    lock = yaml.load(path / "dvc.lock")
    gone = list(lock["stages"]) if stage == WHOLE else [TARGETS[stage]]
    for name in gone:
        for out in lock["stages"].pop(name)["outs"]:
            target = path / out["path"]
            shutil.rmtree(target) if target.is_dir() else target.unlink()
    yaml.dump(lock, path / "dvc.lock")
    clone.commit("before")
    return clone


def repro_targets(stage: str) -> list[str]:
    return [] if stage == WHOLE else ["-s", TARGETS[stage]]
