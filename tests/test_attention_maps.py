"""The attention file: a round trip, and damage noticed. The score against boxes: known cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning.annotations import Annotation, NamedBox
from captioning.attention_maps import load_attention_maps, write_attention_maps
from captioning.errors import CapstanError
from captioning.reporting.attention_scores import (
    attention_factor,
    cell_overlaps,
    centres_inside,
    named_box,
    named_words,
    score_attention,
)

UNIFORM = np.full(49, 1 / 49)


def annotation(image_id: str, boxes: list[NamedBox]) -> Annotation:
    return Annotation(
        image_id=image_id, source="s", split="test", shard="0", key="0", captions=["a"], boxes=boxes
    )  # fmt: skip


def peak(cell: int) -> np.ndarray:
    return np.eye(49)[cell]


def write_example(path: Path) -> None:
    rows = np.stack([peak(3), UNIFORM, peak(48)])
    write_attention_maps(path, (7, 7), [("s/1", ["a", "ø", "<eos>"], rows), ("s/2", [], np.zeros((0, 49)))])


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    write_example(tmp_path / "c.attention.h5")
    maps = load_attention_maps(tmp_path / "c.attention.h5")
    assert maps.grid == (7, 7) and maps.image_ids == ["s/1", "s/2"]
    assert maps.tokens == [["a", "ø", "<eos>"], []]
    assert maps[0].shape == (3, 49) and maps[0].argmax(axis=1)[[0, 2]].tolist() == [3, 48]
    assert maps[1].shape == (0, 49) and len(maps) == 2


def test_the_same_maps_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_example(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_map_at_all_is_a_file_too(tmp_path: Path) -> None:
    write_attention_maps(tmp_path / "a", (2, 3), [])
    assert len(load_attention_maps(tmp_path / "a")) == 0


@pytest.mark.parametrize(
    ("tokens", "weights"),
    [
        (["a", "b"], np.zeros((1, 49))),
        (["a"], np.zeros((1, 48))),
        (["a"], np.full((1, 49), np.nan)),
        (["a b"], np.zeros((1, 49))),
        ([""], np.zeros((1, 49))),
    ],
)
def test_maps_that_do_not_fit_are_refused_and_leave_no_file(
    tmp_path: Path, tokens: list[str], weights: np.ndarray
) -> None:
    with pytest.raises(ValueError, match="s/1"):
        write_attention_maps(tmp_path / "a", (7, 7), [("s/1", tokens, weights)])
    assert not list(tmp_path.iterdir())


def test_flipped_bits_and_cut_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "lite-lstm.attention.h5"
    write_example(path)
    whole = path.read_bytes()
    weights = whole.index(np.stack([peak(3)]).astype(np.float16).tobytes())
    tokens = whole.index("a ø <eos>".encode())
    for position in (weights, weights + 40, tokens):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CapstanError, match="lite-lstm.attention.h5 is damaged.*generate@lite-lstm"):
            load_attention_maps(path)
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CapstanError, match="damaged"):
            load_attention_maps(path)


def test_overlap_of_a_box_with_the_cells() -> None:
    # Two by two cells; the box covers the left column wholly and half of the right one, in the upper row only.
    assert cell_overlaps((2, 2), (0, 0, 0.75, 0.5)).tolist() == [1, 0.5, 0, 0]
    assert centres_inside((2, 2), (0, 0, 0.75, 0.5)).tolist() == [True, True, False, False]


fractions = st.floats(0, 1, allow_nan=False)


@given(st.integers(1, 16), st.integers(1, 16), fractions, fractions, fractions, fractions)
def test_overlaps_add_up_to_the_boxs_area_and_uniform_attention_is_chance(
    height: int, width: int, a: float, b: float, c: float, e: float
) -> None:
    box = (min(a, b), min(c, e), max(a, b), max(c, e))
    area = (box[2] - box[0]) * (box[3] - box[1])
    assert cell_overlaps((height, width), box).mean() == pytest.approx(area, abs=1e-9)
    factor = attention_factor(np.full(height * width, 0.1), (height, width), box)
    assert factor is None or area < 1e-9 or factor == pytest.approx(1)


def test_all_attention_in_a_box_gives_the_inverse_of_its_area() -> None:
    box = (2 / 7, 1 / 7, 4 / 7, 3 / 7)  # columns 2 and 3, rows 1 and 2
    assert attention_factor(peak(7 + 2), (7, 7), box) == pytest.approx(49 / 4)
    assert attention_factor(peak(0), (7, 7), box) == pytest.approx(0)
    assert attention_factor(UNIFORM, (7, 7), (0.5, 0.5, 0.5, 0.9)) is None


def test_a_word_that_names_two_boxes_or_none_is_left_out() -> None:
    one, two = NamedBox(words=["circle", "disc"], box=(0, 0, 0.5, 0.5)), NamedBox(words=["circle"], box=(0.5, 0, 1, 1))
    assert named_box("Disc", [one, two]) == one.box
    assert named_box("circle", [one, two]) is None
    assert named_box("square", [one, two]) is None


def test_scores_of_a_file(tmp_path: Path) -> None:
    box = NamedBox(words=["disc"], box=(0, 0, 1 / 7, 1 / 7))
    rows = [("s/1", ["disc", "of"], np.stack([peak(0), peak(0)])), ("s/2", ["disc"], UNIFORM[None])]
    write_attention_maps(tmp_path / "a", (7, 7), rows)
    maps = load_attention_maps(tmp_path / "a")
    words = named_words(maps, [annotation("s/1", [box]), annotation("s/2", [box]), annotation("s/3", [box])])
    assert [word.factor for word in words] == pytest.approx([49, 1])
    score = score_attention(words)
    assert score is not None and score == score_attention(words)
    assert score.factor.mean == pytest.approx(25) and score.factor.low < 25 < score.factor.high
    assert score.num_words == 2 and score.num_images == 2
    assert score.uniform_hit_rate == pytest.approx(1 / 49)
    assert score_attention(named_words(maps, [annotation("s/1", [])])) is None
