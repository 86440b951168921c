"""A small fixed part of the fault matrix (`make faults` runs all of it), and of the flips (`make flips`)."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
from faults import cases, flips
from faults.__main__ import alone_in
from faults.damage import KINDS, damage_work, damaged, units
from faults.fixed import fixed_cases
from faults.formats import FORMATS
from faults.redone import allowed_units, newest_step
from faults.runner import CaseRun, Reference
from faults.survey import TARGETS, Event, Survey, load_surveys, make_template

STAGES = ["download", "prepare", "features", "train"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "state"
    make_template(folder, STAGES)
    return folder


CHOSEN = [
    ("features", "SIGKILL to dvc"),
    ("train", "newest flip"),  # after a SIGKILL to the whole group
    ("train", "before dvc's open"),
]


@pytest.mark.parametrize(("stage", "name"), CHOSEN, ids=[" ".join(chosen) for chosen in CHOSEN])
def test_a_stage_recovers_with_the_same_bits(template: Path, tmp_path: Path, stage: str, name: str) -> None:
    surveys = load_surveys(template)
    case = next(case for case in fixed_cases(surveys) if case.stage == stage and name in case.name)
    result = CaseRun(Reference.read(template), surveys, case, tmp_path / "case").run()
    assert result.problems == []


@pytest.mark.parametrize("name", FORMATS)
def test_no_damage_is_silent(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = list(flips.check_format(FORMATS[name], 40, random.Random(name)))
    bad = [(verdict, what) for verdict, what in found if verdict not in (flips.REFUSED, flips.HARMLESS)]
    assert bad == [] and len(found) == 80
    assert sum(verdict == flips.REFUSED for verdict, _ in found) >= 40


def test_a_reader_that_verifies_nothing_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def make() -> Path:
        Path("plain").write_bytes(bytes(range(64)))
        return Path("plain")

    found = list(flips.check_format(flips.Format(make, Path.read_bytes), 20, random.Random(0)))
    assert [verdict for verdict, _ in found] == [flips.SILENT] * 40


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "deleted"])
def test_damage_changes_a_file(kind: str) -> None:
    content = bytes(range(1, 201)) * 50
    changed = damaged(content, kind, random.Random(0))
    assert changed != content and len(changed) <= len(content)


def test_the_newest_pieces_are_damaged_and_twins_swapped(tmp_path: Path) -> None:
    for step in (50, 100, 150):
        folder = tmp_path / f"checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(f"{step} steps are done")
    assert [piece[0].parent.name[-3:] for piece in units(tmp_path)] == ["150", "100", "050"]
    changed = damage_work(tmp_path, "newest two", "flip", random.Random(0))
    assert sorted(path.parent.name[-3:] for path in changed) == ["100", "150"]
    before = {path: path.read_bytes() for path in changed}
    first, second = damage_work(tmp_path, "swapped", "", random.Random(0))
    assert first.read_bytes() == before[second] and second.read_bytes() == before[first]


def test_a_shard_and_its_part_are_one_piece(tmp_path: Path) -> None:
    for path in ("fp/shards/00000.tar", "fp/parts/00000.parquet", "fp/shards/00001.tar", "fp/raw/00001/00000.parquet"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    assert [[path.name for path in piece] for piece in units(tmp_path)] == [["00000.parquet", "00000.tar"]]


def trace(*events: str) -> list[dict]:
    """Of a training run in the process 7: `step`, `save` begins, `committed`, `answered`."""
    calls = {
        "step": ("stage", "step", ""),
        "save": ("stage", "mkdir", ".work/train/fp/checkpoints"),
        "committed": ("writer", "fsync", ".work/train/fp/checkpoints"),
        "answered": ("writer", "answered", ""),
    }
    found = []
    for event in events:
        role, call, path = calls[event]
        found.append({"stage": TARGETS["train"], "pid": 7, "role": role, "call": call, "path": path})
    return found


@pytest.mark.parametrize(
    ("events", "allowed"),
    [
        (("step",) * 9, 2),  # more than the interval of 2 is not allowed while the writer is free
        ((*("step",) * 2, "save", *("step",) * 5), 2 + 5),
        ((*("step",) * 2, "save", *("step",) * 3, "committed", "step", "answered", *("step",) * 9), 4 + 2),
        ((*("step",) * 2, "save", "committed", "answered", "step", "step", "save", "step"), 2 + 1),
    ],
)
def test_a_kill_may_cost_the_interval_and_what_the_writer_had_not_finished(
    events: tuple[str, ...], allowed: int
) -> None:
    recovery = [{**trace("step")[0], "pid": 8}]
    assert allowed_units("train", trace(*events) + recovery, 1, 0) == allowed
    assert allowed_units("train", recovery, 1, 0) == 0


def test_a_damaged_checkpoint_does_not_count(tmp_path: Path) -> None:
    for step in (50, 100):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    assert newest_step(tmp_path) == 100
    assert newest_step(tmp_path, [tmp_path / "checkpoints/step-00000100/state.json"]) == 50
    assert newest_step(tmp_path / "none") == 0


def surveys() -> dict[str, Survey]:
    def events(stage: str) -> list[Event]:
        calls = ("open", "fsync", "replace", "step")
        return [
            Event(role, stage, call, number, f".work/{stage}/parts/{number}.h5", 100, 0.01)
            for role in ("dvc", "stage", "writer")
            for call in calls
            for number in (1, 2, 3)
        ]

    return {stage: Survey(stage, events(stage), 3) for stage in cases.SHARES if stage != cases.WHOLE}


def test_two_matrices_do_not_share_a_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path / "state"):
        with pytest.raises(SystemExit, match="another `make faults` is running"), alone_in(tmp_path / "state"):
            pass
    with alone_in(tmp_path / "state"):
        pass


def test_a_seed_and_a_number_give_one_case_and_all_plans_come() -> None:
    found = [cases.draw_case(surveys(), 1, number) for number in range(400)]
    assert found == [cases.draw_case(surveys(), 1, number) for number in range(400)]
    assert found != [cases.draw_case(surveys(), 2, number) for number in range(400)]
    assert {case.stage for case in found} == set(cases.SHARES)
    faults = [fault for case in found for run in case.runs for fault in run]
    assert {fault["action"] for fault in faults} == {"kill", "tell", "fail", "sleep", "tear", "full"}
    assert {fault.get("target") for fault in faults} >= {"stage", "dvc", "group", "writer"}
    assert any(case.damage for case in found) and any(case.changed for case in found)
    assert {case.lock for case in found} == {None, *cases.LOCKS}
    assert {fault.get("signal") for fault in faults} >= {signal.SIGKILL, signal.SIGTERM, signal.SIGINT}
    assert json.dumps(faults)
