"""Views of images: what each shows, and lists of them that are refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from captioning.annotations import Annotation
from captioning.datasets import CaptionBatches
from captioning.errors import CapstanError
from captioning.views import VIEWS, check_views, look
from captioning.vocabulary import Vocabulary

IMAGE = np.arange(17 * 24 * 3, dtype=np.uint16).astype(np.uint8).reshape(17, 24, 3)  # crops: 14 × 21
CROPS = ("center", "top_left", "top_right", "bottom_left", "bottom_right")


def test_each_view_shows_its_part() -> None:
    parts = {
        "plain": IMAGE,
        "center": IMAGE[1:15, 1:22],
        "top_left": IMAGE[:14, :21],
        "top_right": IMAGE[:14, 3:],
        "bottom_left": IMAGE[3:, :21],
        "bottom_right": IMAGE[3:, 3:],
    }
    mirrored = {"mirror": IMAGE[:, ::-1], **{f"{name}_mirror": parts[name][:, ::-1] for name in CROPS}}
    expected = {**parts, **mirrored}
    assert set(expected) == set(VIEWS) and len(VIEWS) == 12
    for name, image in zip(expected, look(IMAGE, list(expected)), strict=True):
        assert np.array_equal(image, expected[name]) and image.dtype == np.uint8, name


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (7, 3), (224, 224)])
def test_views_of_any_size_can_go_to_torch_and_leave_the_image_alone(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    before = image.copy()
    image.flags.writeable = False  # as Pillow's are
    for name, view in zip(VIEWS, look(image, list(VIEWS)), strict=True):
        assert min(view.strides) > 0 and min(view.shape) > 0, name
        wanted = shape if name in ("plain", "mirror") else tuple(max(1, side * 7 // 8) for side in shape)
        assert view.shape[:2] == wanted
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["plain", "miror"], r"unknown view 'miror'. Did you mean 'mirror'\? Choices: bottom_left, .*top_right_mirror"),
        (["mirror", "plain"], "'plain' must come first"),
        ([], "'plain' must come first"),
        (["plain", "center", "center"], "names 'center' more than once"),
        (["plain", "plain"], "names 'plain' more than once"),
    ],
)
def test_lists_that_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(CapstanError, match=message):
        check_views(names)


def test_lists_that_are_good() -> None:
    check_views(["plain"])
    check_views(list(VIEWS))


def test_what_speaks_of_left_and_right_gets_no_mirror_image() -> None:
    views = ["plain", "mirror", "center", "center_mirror"]
    captions = ["a dog", "a dog on the left"]
    annotations = [
        Annotation(image_id=f"x/{i}", source="x", split="train", shard="0", key=str(i), captions=[captions[i % 2]])
        for i in range(200)
    ]
    vocabulary = Vocabulary.build(captions, 1, 9)
    drawn = CaptionBatches(SimpleNamespace(views=views), annotations, vocabulary, 4).draw_views(1, 0)
    assert {views[i] for i in drawn[::2]} == set(views)
    assert {views[i] for i in drawn[1::2]} == {"plain", "center"}
