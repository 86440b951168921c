"""Several captioners scored together: as each alone, also when killed in between; and METEOR's processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_metrics import WITHOUT_SPICE, fake_java, random_captions

from captioning.errors import CapstanError
from captioning.metrics import scoring
from captioning.metrics.meteor import CAPTIONS_AT_ONCE, MAX_PROCESSES, Meteor, num_useful_processes
from captioning.metrics.scoring import MetricScores, score_captioners, score_captions

NUM_IMAGES = 40
GROUPS = [list(range(NUM_IMAGES)), list(range(7)), list(range(7, NUM_IMAGES)), []]
REFERENCES = random_captions(NUM_IMAGES, seed=1)[0]
HYPOTHESES = {name: random_captions(NUM_IMAGES, seed=seed)[1] for name, seed in (("lstm", 2), ("gru", 3), ("blip", 4))}
HYPOTHESES["blip"][3] = ""
FAST = ["Bleu_1", "Bleu_2", "ROUGE_L", "CIDEr"]


def assert_same(found: dict[str, MetricScores], expected: dict[str, MetricScores]) -> None:
    assert list(found) == list(expected)
    for name, score in expected.items():
        assert found[name].groups == score.groups, name
        np.testing.assert_array_equal(found[name].images, score.images, name)


def test_several_captioners_score_as_each_alone() -> None:
    together = score_captioners(WITHOUT_SPICE, REFERENCES, HYPOTHESES, GROUPS)
    assert list(together) == list(HYPOTHESES)
    for captioner, hypotheses in HYPOTHESES.items():
        assert_same(together[captioner], score_captions(WITHOUT_SPICE, REFERENCES, hypotheses, GROUPS))
    assert len({scores["METEOR"].groups[0] for scores in together.values()}) == len(HYPOTHESES)


KILLED = """
import time
from pathlib import Path
from captioning.metrics import scoring
import test_captioners as these
build = scoring.METRICS["CIDEr"]
def build_waiting(task):
    score, seen = build(task), []
    return lambda hypotheses: score(hypotheses) if not seen and not seen.append(1) else time.sleep(600)
scoring.METRICS["CIDEr"] = build_waiting
these.score(Path())
"""


def score(root: Path) -> dict[str, dict[str, MetricScores]]:
    return score_captioners(FAST, REFERENCES, HYPOTHESES, GROUPS, parts={name: root / name for name in HYPOTHESES})


def test_killed_in_between_they_go_on_with_what_is_missing(tmp_path: Path, monkeypatch, capsys) -> None:
    """SIGKILL while CIDEr waits at the second of three captioners."""
    repository = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{repository}{os.pathsep}{repository / 'tests'}"}
    process = subprocess.Popen([sys.executable, "-c", KILLED], env=environment, cwd=tmp_path)
    wanted = {f"{name}/{part}" for name in HYPOTHESES for part in ("Bleu.jsonl", "ROUGE_L.jsonl")} | {
        "lstm/CIDEr.jsonl"
    }
    while process.poll() is None and parts(tmp_path) != wanted:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -9
    before = {path: (tmp_path / path).stat().st_mtime_ns for path in wanted}

    scored: list[str] = []
    build = scoring.METRICS["CIDEr"]
    monkeypatch.setitem(scoring.METRICS, "CIDEr", lambda task: scored.extend(task.hypotheses) or build(task))
    resumed = score(tmp_path)
    assert scored == ["gru", "blip"]
    assert "resumed: 10 of 12 metrics verified, 2 left" in capsys.readouterr().out
    assert {path: (tmp_path / path).stat().st_mtime_ns for path in wanted} == before
    expected = score_captioners(FAST, REFERENCES, HYPOTHESES, GROUPS)
    for captioner in HYPOTHESES:
        assert_same(resumed[captioner], expected[captioner])


def parts(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.glob("*/*.jsonl")}


def test_another_number_of_captions_than_of_images_is_an_error() -> None:
    with pytest.raises(CapstanError, match="39 captions of gru for 40 images"):
        score_captioners(FAST, REFERENCES, {**HYPOTHESES, "gru": HYPOTHESES["gru"][1:]}, GROUPS)


def test_few_captions_do_not_start_many_processes() -> None:
    assert num_useful_processes(10) == 1
    assert num_useful_processes(10**6) == min(MAX_PROCESSES, len(os.sched_getaffinity(0)))


DIES_BUT_ONCE = """
import os, time
try:
    os.mkdir('first')
except FileExistsError:
    print(' '.join(['1.0'] * 23), flush=True)
    os._exit(7)
for line in iter(input, None):
    print(' '.join(['1.0'] * 23), flush=True)
"""


def test_one_of_several_meteor_processes_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("captioning.metrics.meteor.package_folder", lambda name: tmp_path)
    fake_java(tmp_path, DIES_BUT_ONCE)
    number = 4 * CAPTIONS_AT_ONCE
    with pytest.raises(CapstanError, match=r"process ended \(exit code 7\)"), Meteor(num_processes=2) as meteor:
        meteor.score([["a dog"]] * number, ["a dog"] * number, [])
    assert not [child for child in psutil.Process().children() if "java" in " ".join(child.cmdline())]
