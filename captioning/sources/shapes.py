"""`shapes`: drawn scenes of one to three coloured shapes, with human-style captions and the boxes of what they name.

Whatever a caption says can be seen in the image, so a caption is predictable from it: sizes and places come in clear
steps, colours lie far apart, and the nouns of one scene differ, so that attention can be scored against the boxes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from captioning.source_params import DrawnSource
from captioning.sources import scenes
from captioning.sources.scenes import SUPERSAMPLING, Scene, with_article
from captioning.sources.table import Row, draw_splits

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (52, 104, 235),
    "yellow": (247, 213, 48),
    "purple": (150, 60, 190),
    "orange": (247, 132, 28),
}
BACKGROUNDS = {"dark": (38, 40, 46), "light": (226, 226, 220)}
SIZES = {"small": (0.22, 0.27), "large": (0.40, 0.46)}
"""Side of a shape as a fraction of the image's."""
ROW_SIZE = (0.23, 0.28)
"""In scenes of three, where the captions do not speak of sizes."""
NOUNS = ("circle", "square", "triangle", "star", "cross")
PLACES = {"left": 0.27, "middle": 0.5, "right": 0.73}


@dataclass(frozen=True)
class Shape:
    """One shape: the words for it, and where it stands (fractions of the image's side)."""

    noun: str
    colour: str
    size: str
    side: float
    x: float
    y: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        half = self.side / 2
        return self.x - half, self.y - half, self.x + half, self.y + half


def outline(noun: str) -> np.ndarray:
    """Corners of a polygon in the square [-1, 1]²: (num_corners, 2). A circle has many."""
    if noun == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    if noun == "triangle":
        return np.array([(0, -1), (1, 1), (-1, 1)], float)
    if noun == "cross":
        a = 0.36
        quarter = [(a, -1), (a, -a), (1, -a)]
        turns = [np.array([(1, 0), (0, 1)]), np.array([(0, 1), (-1, 0)])]
        turns += [-turns[0], -turns[1]]
        return np.concatenate([np.array(quarter) @ turn for turn in turns])
    num = 72 if noun == "circle" else 10
    angles = np.arange(num) * 2 * np.pi / num - np.pi / 2
    radii = np.where(np.arange(num) % 2, 0.42, 1.0) if noun == "star" else np.ones(num)
    corners = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    low, high = corners.min(axis=0), corners.max(axis=0)
    return 2 * (corners - low) / (high - low) - 1  # fills its box, as the others do


def paint(shapes: list[Shape], tone: str, image_px: int, rng: np.random.Generator) -> Image.Image:
    """The scene as an image: background, shapes with a darker rim, grain."""
    side = image_px * SUPERSAMPLING
    canvas = Image.fromarray(scenes.background(BACKGROUNDS[tone], side, rng).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for shape in shapes:
        fill = np.clip(np.array(COLOURS[shape.colour]) + rng.integers(-12, 13, 3), 0, 255)
        corners = (np.array([shape.x, shape.y]) + outline(shape.noun) * shape.side / 2) * side
        points = [(float(x), float(y)) for x, y in corners]
        pen.polygon(points, fill=tuple(fill.tolist()))
        rim = tuple((fill * 0.72).astype(int).tolist())
        pen.line([*points, points[0]], fill=rim, width=2 * SUPERSAMPLING, joint="curve")
    small = canvas.resize((image_px, image_px), Image.Resampling.BOX)
    return scenes.add_noise(np.asarray(small, np.float32), rng.uniform(2, 7), rng)


def _named(shape: Shape, adjective: str = "") -> str:
    return with_article(" ".join(word for word in (adjective, shape.colour, shape.noun) if word))


def _size_word(shape: Shape, second: bool) -> str:
    return {"large": "big" if second else "large", "small": "little" if second else "small"}[shape.size]


def describe_one(shape: Shape, place: str, tone: str) -> list[str]:
    """Wordings for a single shape."""
    plain, sized, other = (_named(shape, a) for a in ("", _size_word(shape, False), _size_word(shape, True)))
    where = "in the middle" if place == "middle" else f"on the {place} side"
    return [
        f"{sized} {where} of a {tone} background",
        f"{sized} on a {tone} background",
        f"there is {other} {where} of the picture",
        f"{plain} {where} of the image",
        f"the picture shows {sized} {where}",
        f"{other} {where} on a {tone} background",
        f"a single {shape.colour} {shape.noun} on a {tone} background",
        f"{plain} stands alone {where} of the image",
        f"there is {sized} on a {tone} background",
        f"an image of {sized} {where}",
        f"{sized} is shown {where}",
    ]


def describe_pair(first: Shape, second: Shape, vertical: bool, tone: str) -> list[str]:
    """Wordings for two shapes; `first` is the left or the upper one."""
    a, b = _named(first, _size_word(first, False)), _named(second, _size_word(second, False))
    plain_a, plain_b = _named(first), _named(second)
    ahead, behind = ("above", "below") if vertical else ("to the left of", "to the right of")
    near = "over" if vertical else "next to"
    return [
        f"{a} {ahead} {b}",
        f"{a} is {ahead} {b}",
        f"{plain_a} {ahead} {plain_b} on a {tone} background",
        f"there is {plain_a} {ahead} {plain_b}",
        f"{b} {behind} {a}",
        f"{a} {near} {b} on a {tone} background",
        f"{plain_a} and {plain_b} on a {tone} background",
        f"{a} and {b} on a {tone} background",
        f"there is {a} {ahead} {b}",
        f"{plain_b} is {behind} {plain_a}",
    ]


def describe_row(shapes: list[Shape], vertical: bool, tone: str) -> list[str]:
    """Wordings for three shapes, from left to right or from top to bottom."""
    a, b, c = (_named(shape) for shape in shapes)
    line, course = ("column", "from top to bottom") if vertical else ("row", "from left to right")
    ahead = "above" if vertical else "to the left of"
    listed = f"{a} , {b} and {c}".replace(" ,", ",")
    return [
        f"{listed} in a {line}",
        f"{listed} on a {tone} background",
        f"{a}, then {b} and {c} {course}",
        f"there is {a} {ahead} {b} and {c}",
        f"{b} between {a} and {c}",
        f"three shapes in a {line}: {listed}",
        f"{listed} {course}",
        f"there is {b} between {a} and {c} on a {tone} background",
        f"{a} {ahead} {b} and {c} on a {tone} background",
        f"{listed} stand in a {line}",
    ]


def _shape(noun: str, colour: str, size: str, x: float, y: float, rng: np.random.Generator) -> Shape:
    side = float(rng.uniform(*(SIZES[size] if size in SIZES else ROW_SIZE)))
    half = side / 2 + 0.02
    jitter_x, jitter_y = rng.uniform(-0.03, 0.03, 2)
    x, y = (float(np.clip(v, half, 1 - half)) for v in (x + jitter_x, y + jitter_y))
    return Shape(noun, colour, size, side, x, y)


def draw_scene(settings: DrawnSource, index: int, split: str) -> Scene:
    """Scene number `index` of the seed: the same bytes on every call."""
    rng = scenes.rng_for("shapes", settings.seed, index)
    num = int(rng.choice([1, 2, 3], p=[0.3, 0.45, 0.25]))
    nouns = [NOUNS[i] for i in rng.permutation(len(NOUNS))[:num]]
    colours = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:num]]
    tone = list(BACKGROUNDS)[rng.integers(2)]
    vertical = bool(rng.integers(2))
    if num == 1:
        place = list(PLACES)[rng.integers(3)]
        size = list(SIZES)[rng.integers(2)]
        y = 0.5 if place == "middle" else float(rng.uniform(0.3, 0.7))
        shapes = [_shape(nouns[0], colours[0], size, PLACES[place], y, rng)]
        wordings = describe_one(shapes[0], place, tone)
    else:
        sizes = [list(SIZES)[i] for i in rng.integers(0, 2, 2)] if num == 2 else ["plain"] * 3
        steps = [0.27, 0.75] if num == 2 else [0.18, 0.5, 0.82]
        across = rng.uniform(0.42, 0.58, num)
        shapes = []
        for noun, colour, size, along, other in zip(nouns, colours, sizes, steps, across, strict=True):
            x, y = (float(other), along) if vertical else (along, float(other))
            shapes.append(_shape(noun, colour, size, x, y, rng))
        wordings = (
            describe_pair(shapes[0], shapes[1], vertical, tone) if num == 2 else describe_row(shapes, vertical, tone)
        )
    captions = scenes.choose_captions(wordings, settings.captions_per_image, rng)
    image = paint(shapes, tone, settings.image_px, rng)
    return Scene(image, captions, [([shape.noun], shape.box) for shape in shapes])


def shapes_rows(settings: DrawnSource, folder: Path, seed: int) -> list[Row]:
    """Draws `settings.num_images` scenes into `folder`."""
    splits = draw_splits(settings.num_images, settings.val_fraction, settings.test_fraction, settings.seed)
    return scenes.draw_rows("shapes", draw_scene, settings, splits, folder)
