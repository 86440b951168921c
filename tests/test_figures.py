"""The figures: the same bytes for the same numbers, in both themes, and overlays that show where the weight is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from captioning.figures import COLOURS, look, short_names
from captioning.figures.curves import draw_training
from captioning.figures.histograms import draw_lengths, draw_shares
from captioning.figures.intervals import draw_intervals
from captioning.figures.overlays import TILE_PX, WordMap, draw_attention, overlay

CURVES = {
    "a-lstm": {"train/loss": [(1, 3.0), (2, 2.0)], "val/loss": [(2, 2.5)], "val/CIDEr": [(2, 0.5)]},
    "blip": {},
}


def draw_everything(folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    assert draw_training(folder, ["a-lstm", "blip"], CURVES) == ["loss", "validation-cider"]
    marks = {"all": {"a-lstm": (50.0, 40.0, 60.0), "blip": (70.0, 70.0, 70.0)}, "shapes": {"blip": (30.0, 20.0, 35.0)}}
    draw_intervals(folder, "cider", ["a-lstm", "blip"], marks, title="$CIDEr", label="CIDEr × 100", reference=1)
    draw_lengths(folder, {"train": {3: 5, 9: 2}, "val": {}, "test": {4: 1}})
    draw_shares(folder, ["a-lstm", "blip"], {"blip": [0.2, 1.1, 0.4]})
    picture = overlay(np.full((20, 30, 3), 128, np.uint8), np.arange(6.0), (2, 3), (0.1, 0.1, 0.6, 0.9))
    draw_attention(folder / "attention.png", ["a-lstm"], [("a-lstm", [WordMap("$a_1", picture, 2.5)] * 2)])
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_drawing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (draw_everything(tmp_path / name) for name in ("one", "two"))
    assert first == second
    themed = {name for name in first if name != "attention.png"}
    assert themed == {f"{name.removesuffix('-dark.png').removesuffix('.png')}{end}" for name in themed
                      for end in (".png", "-dark.png")}  # fmt: skip
    assert all(data.startswith(b"\x89PNG") and b"Software" not in data for data in first.values())


def test_drawing_leaves_no_global_setting_behind(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw_lengths(tmp_path, {"train": {3: 5}})
    after = dict(matplotlib.rcParams)
    assert {key for key in before if before[key] != after[key]} <= {"backend"}


@pytest.mark.parametrize("cell", [0, 4, 11])
def test_an_overlay_is_brightest_where_the_weight_is(cell: int) -> None:
    weights = np.full(12, 0.01)
    weights[cell] = 0.9
    picture = overlay(np.full((90, 120, 3), 100, np.uint8), weights, (3, 4)).astype(int).sum(axis=-1)
    assert picture.shape == (TILE_PX, round(TILE_PX * 4 / 3))
    cells = picture[: TILE_PX // 3 * 3, : picture.shape[1] // 4 * 4]
    means = cells.reshape(3, TILE_PX // 3, 4, picture.shape[1] // 4).mean(axis=(1, 3))
    assert int(means.argmax()) == cell


def test_an_overlay_without_any_attention_is_still_a_picture() -> None:
    assert overlay(np.zeros((8, 8, 3), np.uint8), np.zeros(4), (2, 2)).dtype == np.uint8


def test_every_captioner_has_a_look_of_its_own() -> None:
    looks = [look(index) for index in range(4 * len(COLOURS["light"]))]
    assert len({(one.colour, one.line) for one in looks}) == len(looks)
    assert len(COLOURS["light"]) == len(COLOURS["dark"])


def test_names_are_shortened_only_where_one_encoder_is_shared() -> None:
    assert short_names(["lite-lstm", "lite-gru", "blip"]) == {"lite-lstm": "lstm", "lite-gru": "gru", "blip": "blip"}
    assert short_names(["lite-lstm", "vgg-lstm"]) == {"lite-lstm": "lite-lstm", "vgg-lstm": "vgg-lstm"}
