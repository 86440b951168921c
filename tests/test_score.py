"""The stage `score`: what it accepts, and the two files that it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning import paths, storage
from captioning.annotations import Annotation, dump_annotations
from captioning.errors import CapstanError
from captioning.metrics import scoring
from captioning.metrics.scoring import MetricScores, load_scores, save_scores, score_captions
from stages.score import score

FAST = ["Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr"]


def annotation(image_id: str, captions: list[str]) -> Annotation:
    source = image_id.split("/")[0]
    return Annotation(image_id=image_id, source=source, split="test", shard="00000", key="0", captions=captions)


TEST = [
    annotation("shapes/1", ["a red circle", "the circle is red"]),
    annotation("digits/2", ["the number three"]),
    annotation("shapes/0", ["a blue square on white", "a square"]),
    annotation("digits/1", ["the numbers one and two", "a one and a two", "two digits"]),
]
HYPOTHESES = {
    "digits/1": "the numbers one and two",
    "digits/2": "",
    "shapes/0": "a blue\nsquare ||| on white",
    "shapes/1": "a red circle",
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    storage.write_json(paths.split_annotations("test"), dump_annotations(TEST))
    write_captions([{"image_id": image_id, "caption": caption} for image_id, caption in HYPOTHESES.items()])
    return tmp_path


def write_captions(results: Any) -> None:
    storage.write_json(paths.captions("blip"), results)


def run(metrics: list[str] = FAST, captioner: str = "blip") -> dict[str, Any]:
    return score(
        captioner=captioner,
        captions=paths.captions(captioner),
        annotations=paths.split_annotations("test"),
        metrics=metrics,
        spice_root=None,
    )


def test_scores_of_all_and_of_each_source(root: Path) -> None:
    report = run([*FAST, "METEOR"])
    assert json.loads(paths.scores("blip").read_text()) == report
    whole = report["blip"]
    assert list(whole) == [*FAST, "METEOR", "num_images", "by_source"]
    assert whole["num_images"] == 4 and list(whole["by_source"]) == ["digits", "shapes"]
    for source, values in whole["by_source"].items():
        own = [image for image in TEST if image.source == source]
        expected = score_captions(
            [*FAST, "METEOR"], [a.captions for a in own], [HYPOTHESES[a.image_id] for a in own], [[0, 1]]
        )
        assert values == {**{n: round(s.groups[0], 6) for n, s in expected.items()}, "num_images": 2}


def test_a_row_for_each_image(root: Path) -> None:
    report = run()
    table = pd.read_parquet(paths.image_scores("blip"))
    assert list(table.columns) == ["image_id", "source", "caption", "references", *FAST]
    assert list(table.image_id) == sorted(HYPOTHESES) and list(table.source) == ["digits"] * 2 + ["shapes"] * 2
    assert list(table.caption) == [HYPOTHESES[image_id] for image_id in table.image_id]
    assert list(table.references[3]) == ["a red circle", "the circle is red"]
    assert table.loc[1, FAST].tolist() == [0.0] * 4  # the empty caption
    assert table.loc[3, "ROUGE_L"] == 1.0
    assert report["blip"]["CIDEr"] == pytest.approx(table.CIDEr.mean(), abs=1e-6)


def test_the_same_bytes_again(root: Path) -> None:
    run()
    files = [paths.scores("blip"), paths.image_scores("blip")]
    first = [path.read_bytes() for path in files]
    write_captions([{"image_id": i, "caption": c} for i, c in reversed(HYPOTHESES.items())])
    run()
    assert [path.read_bytes() for path in files] == first


def test_a_lone_surrogate_does_not_stop_it(root: Path) -> None:
    paths.captions("blip").write_text(
        json.dumps([{"image_id": i, "caption": "a \ud800 circle"} for i in HYPOTHESES]), "ascii"
    )
    assert run()["blip"]["num_images"] == 4


def changed(**captions: str | None) -> list[dict[str, Any]]:
    merged = {**HYPOTHESES, **{name.replace("_", "/"): caption for name, caption in captions.items()}}
    return [{"image_id": i, "caption": c} for i, c in merged.items() if c is not None]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (changed(digits_1=None, shapes_0=None), "2 image ids missing: digits/1, shapes/0"),
        (changed(other_9="a"), "1 image ids unknown: other/9"),
        ([*changed(), {"image_id": "digits/2", "caption": "a"}], "1 image ids more than once: digits/2"),
        ([], r"4 image ids missing.*dvc repro blip"),
        ({"image_id": "a"}, "not a list"),
        ([{"image_id": "digits/1", "caption": None}], "not a list"),
        ([{"image_id": 1, "caption": "a"}], "not a list"),
    ],
)
def test_captions_that_do_not_fit_the_test_split(root: Path, results: Any, message: str) -> None:
    write_captions(results)
    with pytest.raises(CapstanError, match=message):
        run()
    assert not paths.scores("blip").exists() and not paths.image_scores("blip").exists()


def test_only_some_of_many_ids_are_named(root: Path) -> None:
    write_captions([*changed(), *({"image_id": f"other/{i}", "caption": "a"} for i in range(9))])
    with pytest.raises(CapstanError, match=r"9 image ids unknown: other/0, .* and 4 more"):
        run()


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ([], "no image.*test_fraction"),
        ([*TEST, TEST[0]], "more than once: shapes/1"),
        ([*TEST[:3], annotation("digits/1", [])], "without captions: digits/1"),
    ],
)
def test_a_test_split_that_cannot_be_scored(root: Path, test: list[Annotation], message: str) -> None:
    storage.write_json(paths.split_annotations("test"), dump_annotations(test))
    with pytest.raises(CapstanError, match=message):
        run()


def test_an_unknown_metric_is_named_before_anything_is_read(root: Path) -> None:
    paths.captions("blip").unlink()
    with pytest.raises(CapstanError, match="unknown metric 'Meteor'"):
        run(["Meteor"])
    with pytest.raises(CapstanError, match="score.spice_root"):
        run(["SPICE"])


def parts() -> dict[str, Path]:
    return {path.name: path for path in sorted(paths.work_root().glob("score/*/parts/*"))}


def outs() -> list[bytes]:
    return [paths.scores("blip").read_bytes(), paths.image_scores("blip").read_bytes()]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the metrics without a process are computed, in order."""
    seen: list[str] = []

    def noting(build: scoring.Builder) -> scoring.Builder:
        def build_noting(task: scoring.Task) -> scoring.Scorer:
            scorer = build(task)
            seen.append(build.__name__)
            return scorer

        return build_noting

    for name in ("ROUGE_L", "CIDEr"):
        monkeypatch.setitem(scoring.METRICS, name, noting(scoring.METRICS[name]))
    return seen


def test_a_metric_that_is_added_is_computed_alone(root: Path, computed: list[str], capsys) -> None:
    run(["Bleu_1", "ROUGE_L"])
    assert list(parts()) == ["Bleu.jsonl", "ROUGE_L.jsonl"] and computed == ["build_rouge"]
    run(FAST)
    assert computed == ["build_rouge", "build_cider"]
    assert "resumed: 3 of 4 metrics verified, 1 left" in capsys.readouterr().out  # Bleu's orders are one computation
    resumed = outs()
    for part in parts().values():
        part.unlink()
    run(FAST)
    assert outs() == resumed


def test_a_damaged_part_is_set_aside_and_computed_anew(root: Path, computed: list[str], capsys) -> None:
    run(FAST)
    before, computed[:] = outs(), []
    part = parts()["CIDEr.jsonl"]
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    run(FAST)
    assert computed == ["build_cider"] and outs() == before
    assert "CIDEr.jsonl was damaged: set aside" in capsys.readouterr().out
    assert "CIDEr.jsonl.corrupt" in parts()


def test_other_captions_find_no_part_of_these(root: Path, computed: list[str]) -> None:
    run(FAST)
    write_captions(changed(shapes_1="a blue circle"))
    run(FAST)
    assert computed == ["build_rouge", "build_cider"] * 2
    write_captions([{"image_id": image_id, "caption": caption} for image_id, caption in HYPOTHESES.items()])
    run(FAST)
    assert computed == ["build_rouge", "build_cider"] * 2, "settings that come back find their work"


numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(numbers, min_size=1), st.lists(numbers))
def test_scores_come_back_to_the_last_bit(tmp_path_factory, groups: list[float], images: list[float]) -> None:
    folder = tmp_path_factory.mktemp("parts")
    save_scores(folder, "CIDEr", {"CIDEr": MetricScores(groups, np.array(images))})
    found = load_scores(folder, "CIDEr")
    assert found is not None and load_scores(folder, "METEOR") is None
    assert np.array(found["CIDEr"].groups).tobytes() == np.array(groups).tobytes()
    assert found["CIDEr"].images.tobytes() == np.array(images, np.float64).tobytes()


KILLED = """
import sys, time
from captioning.metrics import scoring
def wait(task):
    return lambda hypotheses: time.sleep(600)
scoring.METRICS["ROUGE_L"] = wait
import test_score
test_score.run(["Bleu_4", "METEOR", "ROUGE_L"])
"""


def test_a_killed_run_keeps_its_metrics_and_leaves_no_java_behind(root: Path, capsys) -> None:
    """SIGKILL while ROUGE_L is computed, and METEOR's process waits for its input."""
    repository = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{repository}{os.pathsep}{repository / 'tests'}"}
    process = subprocess.Popen([sys.executable, "-c", KILLED], env=environment)
    while process.poll() is None and "METEOR.jsonl" not in parts():
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("java" in child.name() for child in children)
    process.kill()
    process.wait()
    assert psutil.wait_procs(children, timeout=20)[1] == []
    run(["Bleu_4", "METEOR", "ROUGE_L"])
    assert "resumed: 2 of 3 metrics verified, 1 left" in capsys.readouterr().out
    resumed = outs()
    for part in parts().values():
        part.unlink()
    run(["Bleu_4", "METEOR", "ROUGE_L"])
    assert outs() == resumed


def test_a_foreign_program_ends_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import subprocess, time; from captioning.orphans import bound_to_parent;"
        "print(subprocess.Popen(bound_to_parent(['sleep', '600'])).pid, flush=True); time.sleep(600)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    parent = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    while child.name() != "sleep":
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    child.wait(timeout=10)  # raises where it goes on
