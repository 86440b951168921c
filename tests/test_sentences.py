from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning.sentences import first_sentences

written = st.lists(st.sampled_from([*"ab1 .!?…。\"' \n", "Dr", "e.g", "U.S", "...", "A"])).map("".join)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("A dog runs. A cat sleeps.", "A dog runs."),
        ("a dog runs . a cat sleeps .", "a dog runs ."),  # as Flickr8k and COCO write it
        ("A dog! A cat?", "A dog!"),
        ("He said “stop.” She ran.", "He said “stop.”"),
        ("A dog runs", "A dog runs"),
        ("A 3.5 m pole stands. It is red.", "A 3.5 m pole stands."),
        (
            "Dr. Smith and Mr. Li, e.g. in the U.S. or St. Louis. No!",
            "Dr. Smith and Mr. Li, e.g. in the U.S. or St. Louis.",
        ),
        ("At 5 p.m. on a day. Later.", "At 5 p.m. on a day."),
        ("J. Smith (Dr. Li's friend) runs. He falls.", "J. Smith (Dr. Li's friend) runs."),
        ("A dog ... no, a cat. It is red.", "A dog ... no, a cat."),
        ("A dog… A cat.", "A dog…"),
        ("Wait... The dog runs.", "Wait..."),
        ("一只狗在跑。一只猫在睡觉。", "一只狗在跑。"),
        ("犬が走る！猫は？", "犬が走る！"),
        ("「犬。」猫。", "「犬。」"),
        ("1. A dog. 2. A cat.", "1. A dog."),  # a number alone is no sentence
        ("!!! ... A dog. A cat.", "!!! ... A dog."),
        ("", ""),
    ],
)
def test_the_first_sentence(text: str, first: str) -> None:
    assert first_sentences(text, 1) == first


def test_so_many_sentences() -> None:
    text = "One dog. Two cats! 三只鸟。 Four."
    assert first_sentences(text, 2) == "One dog. Two cats!"
    assert first_sentences(text, 3) == "One dog. Two cats! 三只鸟。"
    assert first_sentences(text, 9) == text


@given(written, st.integers(1, 4))
def test_what_is_kept_is_a_beginning(text: str, count: int) -> None:
    fewer, more = first_sentences(text, count), first_sentences(text, count + 1)
    assert text.startswith(more) and more.startswith(fewer)
    assert first_sentences(fewer, count) == fewer


@pytest.mark.parametrize("hostile", [".", ". ", "! ", ".' ", ".'", "a. ", "...  ", "…x", "。", " ", "u.s. "])
def test_megabytes_of_marks_are_read_once(hostile: str) -> None:
    """Were each mark's whole run or all before it read again, this would outlast the suite's time limit by far."""
    text = hostile * (1_000_000 // len(hostile))
    assert first_sentences(text, 10**9) == text
