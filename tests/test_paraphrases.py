"""METEOR's paraphrase table cut to what captions can touch: no score changes, and what is damaged is not used."""

from __future__ import annotations

import gzip
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning.errors import CapstanError
from captioning.metrics import paraphrases
from captioning.metrics.meteor import Meteor, paraphrase_table
from captioning.metrics.paraphrases import open_relevant

Pair = tuple[str, str]
phrases = st.lists(st.sampled_from("abcde"), min_size=1, max_size=3).map(" ".join)
captions = st.lists(st.sampled_from("abcdexyz"), max_size=8).map(" ".join)


def write_table(path: Path, pairs: list[Pair]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(f"0.{number}\n{first}\n{second}\n" for number, (first, second) in enumerate(pairs))
    return path


def cut(table: Path, references: list[str], hypotheses: list[str]) -> list[Pair]:
    with open_relevant(table, references, hypotheses) as found:
        found.seek(0)
        lines = gzip.decompress(found.read()).decode().splitlines()
    return list(zip(lines[1::3], lines[2::3], strict=True))


def stands_in(phrase: str, texts: list[str]) -> bool:
    return any(f" {phrase} " in f" {text} " for text in texts)


def can_match(pair: Pair, references: list[str], hypotheses: list[str]) -> bool:
    return any(stands_in(p, references) and stands_in(q, hypotheses) for p, q in (pair, pair[::-1]))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(phrases, phrases), min_size=1, max_size=30),
    st.lists(captions, max_size=3),
    st.lists(captions, max_size=3),
    st.sampled_from([7, 64, 1 << 20]),
)
def test_just_the_pairs_that_can_match_in_their_order(
    tmp_path_factory, pairs: list[Pair], references: list[str], hypotheses: list[str], chunk: int
) -> None:
    table = write_table(tmp_path_factory.mktemp("table") / "table.gz", pairs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paraphrases, "CHUNK", chunk)
        found = cut(table, references, hypotheses)
    # These phrases are few, so none shares another's slot.
    assert found == [pair for pair in pairs if can_match(pair, references, hypotheses)]


@pytest.mark.parametrize(
    ("phrase", "caption"),
    [
        ("a dog", "he sees a dog 's tail"),
        ("us flag", "the u.s. flag"),
        ("white brown", "a white-brown cat"),
        ("tail wags", "its tail, wags"),
        ("left", "-lrb- left -rrb-"),
        ("b", "ab a.b"),
        ("b", "ab a..b"),
        ("caf", "a café"),  # not METEOR's word, but harmless
    ],
)
def test_phrases_are_found_as_meteor_splits_captions(tmp_path: Path, phrase: str, caption: str) -> None:
    table = write_table(tmp_path / "table.gz", [("z", "z"), (phrase, "x y"), ("x y", phrase)])
    assert cut(table, [caption], ["x y"]) == cut(table, ["x y"], [caption]) == [(phrase, "x y"), ("x y", phrase)]
    assert cut(table, [caption], [caption]) == cut(table, ["x y"], ["x y"]) == []


@pytest.mark.parametrize(
    "pair", [("élan", "dash"), ("a b c d e f g h", "z"), ("A", "z"), ("a  b", "z"), ("z", "a b "), ("z", "don ’ t")]
)
def test_pairs_in_doubt_are_kept(tmp_path: Path, pair: Pair) -> None:
    assert pair in cut(write_table(tmp_path / "table.gz", [("z", "z"), pair]), ["q"], ["q"])


def damage(content: bytes, kind: str) -> bytes:
    if kind == "cut short":
        return content[: len(content) // 2]
    if kind == "a bit flipped":
        return content[:200] + bytes([content[200] ^ 1]) + content[201:]
    return gzip.compress(gzip.decompress(content) + b"0.5\nhalf a pair\n")


@pytest.mark.parametrize("kind", ["cut short", "a bit flipped", "half a pair"])
def test_a_damaged_table_is_an_error(tmp_path: Path, kind: str) -> None:
    draw = random.Random(0)
    pairs = [(f"{draw.random():.9f}"[2:], f"{draw.random():.9f}"[2:]) for _ in range(1000)]
    table = write_table(tmp_path / "table.gz", pairs)
    table.write_bytes(damage(table.read_bytes(), kind))
    with pytest.raises(CapstanError, match=f"{table} cannot be read.*install pycocoevalcap again"):
        open_relevant(table, ["q"], ["q"])


def paraphrased(number: int, seed: int) -> tuple[list[list[str]], list[str]]:
    """Images whose captions have a pair of the real table in them, plain or odd, among other words and signs."""
    plain = re.compile("[a-z]+( [a-z]+)*\n").fullmatch
    with gzip.open(paraphrase_table(), "rt", encoding="utf-8") as file:
        lines = [next(file) for _ in range(3_000_000)]
    draw = random.Random(seed)
    pairs = [pair for pair in zip(lines[1::3], lines[2::3], strict=True) if plain(pair[0]) or draw.random() < 0.05]
    words = "the u.s. dog 's isn n't 3.5 white-brown -lrb- left -rrb- no. mr. b. café e.g. & # runs in grass".split()

    def caption(phrase: str) -> str:
        around = [draw.choices(words, k=draw.randint(0, 3)) for _ in range(2)]
        return " ".join([*around[0], phrase.strip(), *around[1]])

    chosen = [draw.sample(pairs, 2) for _ in range(number)]
    return [[caption(first[0]), caption(second[1])] for first, second in chosen], [
        caption(f"{first[1].strip()} {second[0]}") for first, second in chosen
    ]


def test_meteor_with_the_cut_table_equals_pycocoevalcap_with_the_whole_one() -> None:
    from pycocoevalcap.meteor.meteor import Meteor as Theirs

    references, hypotheses = paraphrased(300, seed=7)
    groups = [list(range(300)), list(range(50)), []]
    table = paraphrase_table()
    every = [caption for captions in references for caption in captions]
    with open_relevant(table, every, hypotheses) as relevant, open_relevant(table, [], []) as nearly_nothing:
        with Meteor(relevant, num_processes=2) as meteor:
            scores, image_scores = meteor.score(references, hypotheses, groups)
        with Meteor(nearly_nothing) as meteor:
            without = meteor.score(references, hypotheses, groups)[1]
    theirs = Theirs()
    keyed = {i: references[i] for i in range(300)}, {i: [text] for i, text in enumerate(hypotheses)}
    expected, expected_scores = theirs.compute_score(*keyed)
    few, _ = theirs.compute_score(*({i: part[i] for i in range(50)} for part in keyed))
    assert scores == [expected, few, 0.0]
    np.testing.assert_array_equal(image_scores, expected_scores)
    assert (image_scores - without > 0.01).sum() > 100, "the captions above need the table"
