"""What the two embedded sources share: words, phrasing, and writing drawn scenes as a table."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from captioning.orphans import die_with_parent
from captioning.source_params import DrawnSource
from captioning.sources.table import Row, file_url

SUPERSAMPLING = 2
"""Scenes are drawn this much larger and reduced, which smooths the edges."""


@dataclass(frozen=True)
class Scene:
    """A drawn image with its truth."""

    image: Image.Image
    """RGB, image_px × image_px."""
    captions: tuple[str, ...]
    boxes: list[tuple[list[str], tuple[float, float, float, float]]]
    """(words, (left, top, right, bottom) as fractions) of each thing that the captions name."""


# draw(settings, index, split) -> Scene; a function of its arguments alone.
Draw = Callable[[DrawnSource, int, str], Scene]


def rng_for(*parts: object) -> np.random.Generator:
    """A generator seeded by names and numbers; equal parts give equal draws on every machine."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def with_article(phrase: str) -> str:
    """`a` or `an`: by the spelling, but `one` begins with the sound of a w."""
    return f"{'an' if phrase[0] in 'aeiou' and phrase != 'one' else 'a'} {phrase}"


def choose_captions(candidates: Sequence[str], num: int, rng: np.random.Generator) -> tuple[str, ...]:
    """`num` different captions of the candidates, which must be enough."""
    different = list(dict.fromkeys(candidates))
    assert len(different) >= num, f"{len(different)} wordings for {num} captions"
    return tuple(different[i] for i in rng.permutation(len(different))[:num])


def background(colour: tuple[int, int, int], image_px: int, rng: np.random.Generator) -> np.ndarray:
    """A plain colour with a soft change of light across it.

    Returns:
        (image_px, image_px, 3) float32, about [0, 255].
    """
    base = np.array(colour, np.float32) + rng.uniform(-10, 10, 3).astype(np.float32)
    direction, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 14)
    axis = np.linspace(-1, 1, image_px, dtype=np.float32)
    light = np.cos(direction) * axis[None, :] + np.sin(direction) * axis[:, None]
    return base + np.float32(strength) * light[..., None]


def add_noise(pixels: np.ndarray, sigma: float, rng: np.random.Generator) -> Image.Image:
    """Grey grain over (height, width, 3) pixels, as an image."""
    grain = rng.standard_normal(pixels.shape[:2], np.float32) * np.float32(sigma)
    return Image.fromarray((pixels + grain[..., None]).clip(0, 255).astype(np.uint8))


def _draw_one(job: tuple[Draw, str, DrawnSource, int, str, Path]) -> Row:
    draw, source, settings, index, split, folder = job
    scene = draw(settings, index, split)
    name = f"{index:06d}"
    path = folder / f"{name}.png"
    temporary = path.with_suffix(".tmp")
    scene.image.save(temporary, "PNG", compress_level=1)
    os.replace(temporary, path)
    boxes = [{"words": words, "box": [round(side, 5) for side in box]} for words, box in scene.boxes]
    return Row(
        image_id=f"{source}/{name}",
        source=source,
        split=split,
        url=f"{name}.png",
        location=file_url(path),
        captions=scene.captions,
        boxes=json.dumps(boxes),
    )


def draw_rows(source: str, draw: Draw, settings: DrawnSource, splits: Sequence[str], folder: Path) -> list[Row]:
    """Draws all scenes into `folder` (a PNG each, by two processes) and gives their table in the order of `splits`."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(draw, source, settings, index, split, folder) for index, split in enumerate(splits)]
    if len(jobs) < 200:  # starting processes takes longer
        return [_draw_one(job) for job in jobs]
    with get_context("spawn").Pool(2, die_with_parent, (signal.SIGKILL,)) as pool:
        return list(pool.imap(_draw_one, jobs, chunksize=50))
