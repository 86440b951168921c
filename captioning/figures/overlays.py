"""Attention over a thumbnail: where a captioner looked for each word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from captioning.figures import FAINT, INK, look, save_figure, theme_context

# Dark blue-black to amber (an own ramp): the picture stays readable under it, and it is ordered in grey as well.
_RAMP = np.array([[0.02, 0.03, 0.12], [0.30, 0.06, 0.40], [0.80, 0.22, 0.33], [0.99, 0.62, 0.20], [1.0, 0.96, 0.62]])
TILE_PX = 168
MAX_WORDS = 24


@dataclass(frozen=True)
class WordMap:
    """One generated word with the picture of its attention."""

    word: str
    picture: NDArray[np.uint8]
    """(TILE_PX, width, 3) RGB: the thumbnail under the map."""
    factor: float | None
    """Attention inside the box that the word names, against a uniform map; None where it names none."""


def overlay(
    thumbnail: NDArray[np.uint8],
    weights: NDArray[np.floating],
    grid: tuple[int, int],
    box: tuple[float, float, float, float] | None = None,
) -> NDArray[np.uint8]:
    """The thumbnail with the upsampled map over it: HWC uint8 RGB, the shorter side TILE_PX.

    The map is scaled to its own largest weight, so the colours say where, not how strongly.

    Args:
        thumbnail: HWC uint8 RGB.
        weights: (height * width,), non-negative.
        box: (left, top, right, bottom) fractions, drawn as a frame.
    """
    from PIL import Image, ImageDraw

    scale = TILE_PX / min(thumbnail.shape[:2])
    size = (round(thumbnail.shape[1] * scale), round(thumbnail.shape[0] * scale))
    photo = np.asarray(Image.fromarray(thumbnail).resize(size, Image.Resampling.LANCZOS), dtype=np.float32) / 255
    coarse = np.asarray(weights, dtype=np.float32).reshape(grid)
    fine = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    fine = np.clip(fine / max(float(coarse.max()), 1e-9), 0, 1)
    positions = np.linspace(0, 1, len(_RAMP))
    heat = np.stack([np.interp(fine, positions, _RAMP[:, channel]) for channel in range(3)], axis=-1)
    grey = photo.mean(axis=-1, keepdims=True)
    strength = 0.18 + 0.62 * fine[..., None]  # the picture stays in sight where the decoder did not look
    mixed = (1 - strength) * 0.72 * (0.7 * photo + 0.3 * grey) + strength * heat
    picture = Image.fromarray((255 * np.clip(mixed, 0, 1)).round().astype(np.uint8))
    if box is not None:
        left, top, right, bottom = (round(f * (s - 1)) for f, s in zip(box, size * 2, strict=True))
        frame = ImageDraw.Draw(picture)
        for inset, colour in ((-1, "black"), (0, "white"), (1, "white"), (2, "black")):
            if right - left > 2 * inset and bottom - top > 2 * inset:
                frame.rectangle((left + inset, top + inset, right - inset, bottom - inset), outline=colour)
    return np.asarray(picture)


def draw_attention(path: Path, captioners: Sequence[str], rows: Sequence[tuple[str, Sequence[WordMap]]]) -> None:
    """One PNG for an image: a row of word maps for each captioner.

    Args:
        captioners: all of them in the order of params, which fixes their colours.
        rows: (captioner, its words).
    """
    import matplotlib.pyplot as plt

    num_columns = max(1, max(len(words) for _, words in rows))
    with theme_context("light"):
        size = (max(1.15 * num_columns, 4), 1.62 * len(rows))
        figure, grid = plt.subplots(len(rows), num_columns, figsize=size, squeeze=False, layout="constrained")
        for (captioner, words), line in zip(rows, grid, strict=True):
            colour = look(list(captioners).index(captioner)).colour
            for column, axes in enumerate(line):
                axes.set_axis_off()
                if column < len(words):
                    axes.imshow(words[column].picture)
                    axes.set_title(words[column].word, fontsize=9, fontweight="normal", loc="center", pad=3)
                    if words[column].factor is not None:
                        axes.text(0.5, -0.04, f"{words[column].factor:.1f}× chance", ha="center", va="top",
                                  fontsize=7.5, color=INK["light"], transform=axes.transAxes)  # fmt: skip
            line[0].annotate(captioner, (0, 1.24), xycoords="axes fraction", fontsize=8.5, color=colour,
                             fontweight="bold", annotation_clip=False)  # fmt: skip
        figure.patch.set_edgecolor(FAINT["light"])
        save_figure(figure, path)
