"""Templates: tiny clones after uninterrupted runs, and what each stage did to files meanwhile.

Cases are copies of a template without one stage's results (or without all), so no case waits for another's stages.
A stage is named as in DVC, or with the variant of the template: `train*2` is train in two processes, `train*live`
one that fine-tunes the encoder, `train*options` one with all that a checkpoint can hold, `train*compiled` one through
torch.compile, `download*web` a download from `faults.web`'s unreliable server.
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
from faults import web
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
TWO, WEB, LIVE, OPTIONS, COMPILED = "2", "web", "live", "options", "compiled"
VARIANTS: dict[str, tuple[str, ...]] = {
    "": tuple(TARGETS),
    TWO: ("features*2", "train*2", "generate*2"),
    WEB: ("download*web",),
    LIVE: ("train*live", "generate*live"),
    OPTIONS: ("train*options",),
    COMPILED: ("train*compiled",),
}
"""Stages of each template."""
VARIANT_SETTINGS: dict[str, dict[str, Any]] = {
    TWO: {stage: {"num_processes": 2} for stage in ("features", "train", "generate")},
    WEB: web.SETTINGS,
    LIVE: {
        "train": {"encoder_mode": "live", "num_epochs": 3},
        "encoder_settings": {"efficientnet_lite0": {"trainable": 2, "unfreeze_every_epochs": 1}},
    },
    OPTIONS: {
        "train": {
            "accumulate_steps": 2,
            "num_epochs": 6,
            "ema_decay": 0.9,
            "scheduler": {
                "name": "plateau",
                "factor": 0.5,
                "patience": 0,
                "min_delta": 0.0,
                "warmup_steps": 2,
                "min_factor": 0.0,
            },
            "scheduled_sampling": {"start_epoch": 2, "every_epochs": 1, "increase": 0.1, "maximum": 0.3},
            "self_critical": {"start_epoch": 5, "num_samples": 3, "rate_factor": 0.5, "cross_entropy_weight": 0.2},
            "gradient_checkpointing": True,
        },
    },
    COMPILED: {"train": {"compile": True}},
}
"""Over `SETTINGS`. `live`: augmented images; the encoder thaws in the second epoch and the third."""
UNITS = {
    "download": r"/parts/.*\.parquet\.tmp$",
    "features": r"\.h5(\.\d+)?\.tmp$",  # ranks but the first add their process's number
    "generate": r"\.jsonl(\.\d+)?\.tmp$",
    "score": r"\.jsonl\.tmp$",
}
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


def base(stage: str) -> str:
    """`train` of `train*2`."""
    return stage.partition("*")[0]


def variant(stage: str) -> str:
    """`2` of `train*2`; empty for the plain template."""
    return stage.partition("*")[2]


def template_of(folder: Path, name: str) -> Path:
    """Where a variant's template lies in the state's folder."""
    return folder / (f"template-{name}" if name else "template")


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
    trace = [event for event in trace if event["stage"] == TARGETS.get(base(stage))]
    if base(stage) in ("train", "blip"):
        return sum(event["call"] == "step" and event["role"] in ("stage", "rank0") for event in trace)
    return sum(event["call"] == "replace" and is_unit(stage, event["path"]) for event in trace)


def is_unit(stage: str, path: str) -> bool:
    """Whether the renamed file is a finished piece of a stage's work."""
    pattern = UNITS.get(base(stage))
    return pattern is not None and path.startswith(".work/") and bool(re.search(pattern, path))


def _events(trace: list[dict[str, Any]]) -> list[Event]:
    following: dict[int, float] = {}
    found = []
    for event in [event for event in reversed(trace) if event["call"] != "answered"]:
        gap = following.get(event["pid"], event["time"]) - event["time"]
        following[event["pid"]] = event["time"]
        size = event.get("num_bytes", 0)
        names = [event[name] for name in ("role", "stage", "call", "number", "path")]
        found.append(Event(*names, size, round(gap, 4)))
    return found[::-1]


def make_template(folder: Path, stages: Sequence[str] = VARIANTS[""]) -> None:
    """Runs the stages, each alone and traced, in `folder/template`, and writes `folder/template.json`."""
    path = template_of(folder, "")
    shutil.rmtree(path, ignore_errors=True)
    clone = Clone.make(path)
    clone.set(SETTINGS | _recovery())
    _run_stages(clone, folder, _with_what_they_need(stages))
    if set(stages) == set(TARGETS):
        assert not (ran := stages_run(clone.dvc("repro"))), f"{ran} ran again after every stage had run"
    _finish(clone)


def make_variant(folder: Path, name: str) -> None:
    """The same for a variant, in a copy of the plain template; `faults.web` must be serving for its own."""
    path = template_of(folder, name)
    shutil.rmtree(path, ignore_errors=True)
    clone = Clone(template_of(folder, "")).copy(path)
    if name == WEB:
        (path / web.TABLE).write_text(web.table())
    clone.set(VARIANT_SETTINGS[name])
    _run_stages(clone, folder, {stage: TARGETS[base(stage)] for stage in VARIANTS[name]})
    _finish(clone)


def _run_stages(clone: Clone, folder: Path, targets: dict[str, str]) -> None:
    surveys = []
    for stage, target in targets.items():
        print(f"{clone.path.name}: {target}", flush=True)
        runs = folder / "runs" / clone.path.name / target
        shutil.rmtree(runs, ignore_errors=True)
        run = Run(clone, runs, ["-s", target], [])
        outcome = run.wait()
        if outcome.code != 0:
            raise SystemExit(f"the uninterrupted run of {target} failed:\n{outcome.output[-3000:]}")
        trace = read_trace(run.folder)
        surveys.append(Survey(stage, _events(trace), count_units(stage, trace)))
    text = json.dumps([asdict(survey) for survey in surveys])
    (folder / f"{clone.path.name}.json").write_text(text)


def _finish(clone: Clone) -> None:
    clone.commit("run")
    for name in (".work", ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(clone.path / name, ignore_errors=True)


def _recovery() -> dict[str, Any]:
    """Checkpoints every few steps, where params.yaml has that section."""
    params = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    changes = {"checkpoint_steps": CHECKPOINT_STEPS, "min_free_gb": 0.001}  # a full disk would cost old work
    return {"recovery": changes} if "recovery" in params else {}


def _with_what_they_need(stages: Sequence[str]) -> dict[str, str]:
    targets: dict[str, str] = {}
    for stage in stages:
        if stage == "report":
            targets["score-blip"] = "score-blip"
        targets[stage] = TARGETS[stage]
    return targets


def load_surveys(folder: Path) -> dict[str, Survey]:
    """Surveys of all templates by stage, as `make_template` and `make_variant` wrote them."""
    found = {}
    for path in sorted(folder.glob("template*.json")):
        for tree in json.loads(path.read_text()):
            events = [Event(**event) for event in tree["events"]]
            num_units = count_units(tree["stage"], [asdict(event) for event in events])  # as it is counted now
            found[tree["stage"]] = Survey(tree["stage"], events, num_units)
    return found


def load_lock(clone: Clone) -> dict[str, Any]:
    """dvc.lock less what one run alone owns: the digest and size of index.html."""
    tree = YAML(typ="safe", pure=True).load(clone.path / "dvc.lock")["stages"]
    for out in tree.get("report", {}).get("outs", []):
        if out["path"] == "reports/index.html":
            out.pop("md5"), out.pop("size")
    return tree


NOT_COMPARED = (".git", ".dvc", ".work", "dvc.lock", "dvc.lock.corrupt")


def snapshot(clone: Clone) -> dict[str, str]:
    """sha256 of every file of a clone besides git's, DVC's and Python's own, dvc.lock and work in progress."""
    digests = {}
    for path in sorted(clone.path.rglob("*")):
        name = path.relative_to(clone.path).as_posix()
        if name.split("/")[0] in NOT_COMPARED or "__pycache__" in name or path.is_dir():
            continue
        content = path.read_bytes()
        if name == "reports/index.html":
            content = without_run(content.decode()).encode()
        digests[name] = hashlib.sha256(content).hexdigest()
    return digests


def prepare_case(folder: Path, path: Path, stage: str) -> Clone:
    """A copy of its template that has not run `stage` yet (WHOLE: nothing yet), committed as such."""
    clone = Clone(template_of(folder, variant(stage))).copy(path)
    yaml = YAML()
    lock = yaml.load(path / "dvc.lock")
    gone = list(lock["stages"]) if stage == WHOLE else [TARGETS[base(stage)]]
    for name in gone:
        for out in lock["stages"].pop(name)["outs"]:
            target = path / out["path"]
            shutil.rmtree(target) if target.is_dir() else target.unlink()
    yaml.dump(lock, path / "dvc.lock")
    clone.commit("before")
    return clone


def repro_targets(stage: str) -> list[str]:
    return [] if stage == WHOLE else ["-s", TARGETS[base(stage)]]
