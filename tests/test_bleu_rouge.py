"""BLEU and ROUGE-L of our own: equal to pycocoevalcap's, for images and for groups, however odd the captions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning.errors import CapstanError
from captioning.metrics.bleu import NUM_ORDERS, Bleu
from captioning.metrics.rouge import RougeL

Image = tuple[list[str], str]
WORDS = ["a", "b", "c", "1\u00a01/2"]  # the tokeniser puts such a space, which is none for ROUGE-L, into fractions
captions = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
images = st.lists(st.tuples(st.lists(captions, min_size=1, max_size=4), captions), min_size=1, max_size=6)


def split(texts: list[str]) -> list[list[str]]:
    return [text.split() for text in texts]


def their_bleu(group: list[Image]) -> tuple[list[float], np.ndarray]:
    from pycocoevalcap.bleu.bleu import Bleu as Theirs

    references = {i: image[0] for i, image in enumerate(group)}
    score, scores = Theirs(NUM_ORDERS).compute_score(references, {i: [h] for i, (_, h) in enumerate(group)}, verbose=0)
    return score, np.array(scores)


@settings(max_examples=300, deadline=None)
@given(images, st.data())
def test_bleu_equals_pycocoevalcap(images: list[Image], data: st.DataObject) -> None:
    group = data.draw(st.lists(st.integers(0, len(images) - 1), unique=True))
    bleu = Bleu([split(references) for references, _ in images])
    groups, scores = bleu.score(split([hypothesis for _, hypothesis in images]), [range(len(images)), group])
    expected, expected_scores = their_bleu(images)
    np.testing.assert_allclose(groups[0], expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-12)
    expected = their_bleu([images[i] for i in group])[0] if group else [0.0] * NUM_ORDERS
    np.testing.assert_allclose(groups[1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", [(4, 2), (2, 4), (2, 2, 5), (9,), (1,), (0, 6)])
def test_bleu_takes_the_shorter_of_two_lengths_that_are_as_close(lengths: tuple[int, ...]) -> None:
    references = [" ".join("abcdefghi"[:length]) for length in lengths]
    groups, scores = Bleu([split(references)]).score([["a", "b", "c"]], [[0]])
    expected, expected_scores = their_bleu([(references, "a b c")])
    assert groups[0] == expected and scores.tolist() == expected_scores.tolist()


def test_bleu_of_nothing() -> None:
    groups, scores = Bleu([]).score([], [[]])
    assert groups == [[0.0] * NUM_ORDERS] and scores.shape == (NUM_ORDERS, 0)


@settings(max_examples=300, deadline=None)
@given(images)
def test_rouge_equals_pycocoevalcap(images: list[Image]) -> None:
    from pycocoevalcap.rouge.rouge import Rouge as Theirs

    hypotheses = [hypothesis for _, hypothesis in images]
    expected = [Theirs().calc_score([hypothesis], references) for references, hypothesis in images]
    empty = [not hypothesis for hypothesis in hypotheses]  # theirs gives one 1 where a reference is empty too
    expected = np.where(empty, 0.0, expected)
    found = RougeL([references for references, _ in images]).score(hypotheses)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_rouge_of_long_captions() -> None:
    from pycocoevalcap.rouge.rouge import Rouge as Theirs

    draw = np.random.default_rng(0)
    first, second = (" ".join(draw.choice(list("abcdefgh"), 300)) for _ in range(2))
    assert RougeL([[first, "x"]]).score([second])[0] == Theirs().calc_score([second], [first, "x"])


@pytest.mark.parametrize("metric", [Bleu, RougeL])
def test_images_without_references_are_refused(metric: type) -> None:
    with pytest.raises(CapstanError, match="at least one reference"):
        metric([["a"], []])
