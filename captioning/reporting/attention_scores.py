"""Attention scored against the boxes that were drawn: does a captioner look at what it names?

Apart from `captioning.attention_maps`, which `generate` imports: a new way of scoring must not caption anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from captioning.annotations import Annotation, NamedBox
from captioning.attention_maps import AttentionMaps
from captioning.reporting.intervals import Interval, bootstrap_interval

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) as fractions of the image."""


def cell_overlaps(grid: tuple[int, int], box: Box) -> NDArray[np.float64]:
    """How much of each grid cell lies in a box: (height * width,) in [0, 1], row by row.

    The grid is taken to cover the whole image evenly, as it does when the encoder's transform does not crop.
    """
    left, top, right, bottom = box
    return np.outer(_axis_overlaps(grid[0], top, bottom), _axis_overlaps(grid[1], left, right)).reshape(-1)


def _axis_overlaps(num_cells: int, start: float, end: float) -> NDArray[np.float64]:
    edges = np.linspace(0, 1, num_cells + 1)
    covered = np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)
    return np.clip(covered * num_cells, 0, 1)


def centres_inside(grid: tuple[int, int], box: Box) -> NDArray[np.bool_]:
    """Which cells have their centre in a box: (height * width,), row by row."""
    left, top, right, bottom = box
    rows, columns = ((np.arange(n) + 0.5) / n for n in grid)
    return np.outer((rows >= top) & (rows <= bottom), (columns >= left) & (columns <= right)).reshape(-1)


def named_box(token: str, boxes: Sequence[NamedBox]) -> Box | None:
    """The box that a word names, if it names exactly one."""
    named = [entry.box for entry in boxes if token.lower() in entry.words]
    return named[0] if len(named) == 1 else None


def attention_factor(weights: NDArray[np.floating], grid: tuple[int, int], box: Box) -> float | None:
    """Attention inside a box divided by what a uniform map would put there; None for an empty box or no attention."""
    overlaps = cell_overlaps(grid, box)
    total = float(np.sum(weights, dtype=np.float64))  # float16 rows sum to 1 only nearly
    if not overlaps.any() or total <= 0:
        return None
    return float(np.asarray(weights, np.float64) @ overlaps) / total / float(overlaps.mean())


@dataclass(frozen=True)
class NamedWord:
    """A generated word that names exactly one box of its image."""

    image_id: str
    source: str
    factor: float
    """Attention inside the box divided by what a uniform map would put there; 1 is chance."""
    hit: float
    """1 where the strongest cell's centre lies in the box, else 0."""
    uniform_hit: float
    """The chance of a hit for a cell drawn at random."""


def named_words(maps: AttentionMaps, annotations: Sequence[Annotation]) -> list[NamedWord]:
    """Scores each word that names one box; words that name several boxes of the image, or none, are left out."""
    by_id = {annotation.image_id: annotation for annotation in annotations}
    scored = []
    for index, image_id in enumerate(maps.image_ids):
        annotation = by_id.get(image_id)
        if annotation is None or not annotation.boxes:
            continue
        for token, weights in zip(maps.tokens[index], maps[index].astype(np.float64), strict=True):
            box = named_box(token, annotation.boxes)
            factor = attention_factor(weights, maps.grid, box) if box else None
            if box is None or factor is None:
                continue
            inside = centres_inside(maps.grid, box)
            hit = float(inside[int(weights.argmax())])
            scored.append(NamedWord(image_id, annotation.source, factor, hit, float(inside.mean())))
    return scored


@dataclass(frozen=True)
class AttentionScore:
    """How well attention finds what a word names, over all scored words."""

    factor: Interval
    hit_rate: Interval
    uniform_hit_rate: float
    num_words: int
    num_images: int


def score_attention(words: Sequence[NamedWord]) -> AttentionScore | None:
    """Means and 95 % intervals (resampling images) over scored words; None where no word names a box."""
    if not words:
        return None
    _, owner = np.unique([word.image_id for word in words], return_inverse=True)
    counts = np.bincount(owner)
    factors, hits = (np.bincount(owner, weights=[getattr(word, name) for word in words]) for name in ("factor", "hit"))
    return AttentionScore(
        factor=bootstrap_interval(factors, counts),
        hit_rate=bootstrap_interval(hits, counts),
        uniform_hit_rate=float(np.mean([word.uniform_hit for word in words])),
        num_words=len(words),
        num_images=len(counts),
    )
