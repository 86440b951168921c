from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning.errors import CapstanError
from captioning.vocabulary import SPECIAL, Vocabulary, clean_caption


def test_cleaning_keeps_words_and_drops_the_rest() -> None:
    assert clean_caption("A man's T-shirt,\n\n reads “3.5” !!!") == "a man's t-shirt reads 3.5"
    assert clean_caption("A Dog .", lowercase=False) == "A Dog"
    assert clean_caption("|||  … 🙂 \u2028") == ""
    assert clean_caption("ﬁve ＤＯＧＳ") == "five dogs"  # ligature and full-width letters
    assert clean_caption("man’s") == "man's"


@given(st.text())
def test_cleaning_twice_changes_nothing_more(text: str) -> None:
    once = clean_caption(text)
    assert clean_caption(once) == once
    assert "\n" not in once and "  " not in once


def test_frequency_threshold_and_order() -> None:
    vocabulary = Vocabulary.build(["b a a", "a b c"], min_frequency=2, max_length=5)
    assert vocabulary.words == [*SPECIAL, "a", "b"]
    assert vocabulary.encode("A c b.") == [4, Vocabulary.unk_id, 5]
    assert vocabulary.decode([4, Vocabulary.unk_id, 5, Vocabulary.eos_id, 4]) == "a b"


@given(st.lists(st.lists(st.sampled_from("abcdefg"), min_size=1).map(" ".join), min_size=1))
def test_known_captions_survive_encoding(captions: list[str]) -> None:
    vocabulary = Vocabulary.build(captions, min_frequency=1, max_length=5)
    assert [vocabulary.decode(vocabulary.encode(caption)) for caption in captions] == captions


def test_save_and_load(tmp_path) -> None:
    vocabulary = Vocabulary.build(["ein Hündchen"], 1, 7, lowercase=False)
    vocabulary.save(tmp_path / "vocabulary.json")
    again = Vocabulary.load(tmp_path / "vocabulary.json")
    assert (again.words, again.max_length, again.lowercase) == (vocabulary.words, 7, False)


def test_damaged_vocabulary_is_refused(tmp_path) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_text('{"schema_version": 99}')
    with pytest.raises(CapstanError, match="schema"):
        Vocabulary.load(path)
    path.write_text("{")
    with pytest.raises(CapstanError, match="not valid JSON"):
        Vocabulary.load(path)
    with pytest.raises(CapstanError, match="starts with"):
        Vocabulary(["a"], 3)
