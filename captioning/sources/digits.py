"""`digits`: scenes of one to three real handwritten digits on paper, with captions and boxes.

The handwriting is scikit-learn's copy of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak
1998; 1797 samples of 8×8). No sample appears in more than one split.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from captioning.source_params import DrawnSource
from captioning.sources import scenes
from captioning.sources.scenes import Scene, with_article
from captioning.sources.table import Row, draw_splits

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {"black": (28, 28, 32), "blue": (36, 66, 190), "red": (196, 36, 40), "green": (24, 128, 60)}
PAPERS = {"white": (246, 246, 243), "yellow": (250, 230, 140), "lined": (246, 246, 243)}
LINE_COLOUR = (150, 180, 214)
SPLIT_SHARES = {"train": (0.0, 0.7), "val": (0.7, 0.8), "test": (0.8, 1.0)}
"""Which part of each digit's handwritten samples a split draws from."""
SIZES = {1: (0.50, 0.58), 2: (0.42, 0.48), 3: (0.33, 0.37)}
"""Height of a digit's strokes as a fraction of the image's side, by how many there are."""
MAX_WIDTH = {1: 0.6, 2: 0.42, 3: 0.29}
CENTRES = {1: (0.5,), 2: (0.27, 0.73), 3: (0.18, 0.5, 0.82)}


@cache
def handwriting() -> tuple[np.ndarray, np.ndarray]:
    """All samples: ink (1797, 8, 8) float32 in [0, 1], and the digits (1797,)."""
    from sklearn.datasets import load_digits

    samples = load_digits()
    return (samples.images / 16).astype(np.float32), samples.target


@cache
def samples_of(digit: int, split: str, seed: int) -> tuple[int, ...]:
    """Numbers of the handwritten samples of one digit that a split may use; splits share none."""
    numbers = np.flatnonzero(handwriting()[1] == digit)
    order = scenes.rng_for("digits", seed, "samples", digit).permutation(numbers)
    low, high = (round(share * len(order)) for share in SPLIT_SHARES[split])
    return tuple(int(number) for number in order[low:high])


def _stamp(ink: np.ndarray, height_px: int, max_width_px: int) -> np.ndarray:
    """A sample cut to its strokes, enlarged smoothly, its contrast raised so that it looks like a pen's stroke.

    Returns:
        (height, width) float32 in [0, 1], a little larger than the strokes.
    """
    rows, columns = (np.flatnonzero((ink > 0.25).any(axis=axis)) for axis in (1, 0))
    strokes = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = min(height_px / strokes.shape[0], max_width_px / strokes.shape[1])
    padded = np.pad(strokes, 1)  # room for the smoothed edge
    size = round(padded.shape[1] * scale), round(padded.shape[0] * scale)
    image = Image.fromarray(padded).resize(size, Image.Resampling.BICUBIC)
    return 1 / (1 + np.exp(-(np.asarray(image, np.float32) - 0.42) * 11))


def _paper(kind: str, image_px: int, rng: np.random.Generator) -> np.ndarray:
    pixels = scenes.background(PAPERS[kind], image_px, rng)
    if kind == "lined":
        step = image_px / 9
        offset = rng.uniform(0, step)
        for line in np.arange(offset, image_px, step).astype(int):
            pixels[line : line + max(2, image_px // 110)] = LINE_COLOUR
    return pixels


def _stroke_box(stamp: np.ndarray, left: int, top: int, image_px: int) -> tuple[float, float, float, float]:
    rows, columns = (np.flatnonzero((stamp > 0.5).any(axis=axis)) for axis in (1, 0))
    edges = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
    x0, y0, x1, y1 = (float(np.clip(edge / image_px, 0, 1)) for edge in edges)
    return x0, y0, x1, y1


def describe(digits: list[int], ink: str, paper: str) -> list[str]:
    """Wordings for the digits from left to right."""
    names = [WORDS[digit] for digit in digits]
    hand = [with_article(f"handwritten {name}") for name in names]
    bare = [with_article(name) for name in names]
    on = f"on {paper} paper"
    if len(digits) == 1:
        return [
            f"{hand[0]} in {ink} ink {on}",
            f"{hand[0]} {on}",
            f"{with_article(ink)} {names[0]} written {on}",
            f"the digit {names[0]} written in {ink} ink",
            f"the digit {names[0]} written by hand {on}",
            f"the number {names[0]} in {ink} ink {on}",
            f"there is {hand[0]} in {ink} ink",
            f"someone wrote the digit {names[0]} {on}",
            f"the digit {names[0]} in {ink} ink {on}",
            f"{hand[0]} in {ink} ink",
        ]
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    side_by_side = f"{hand[0]} next to {bare[1]}" + (f" and {bare[2]}" if len(digits) == 3 else "")
    left_of = f"{bare[0]} to the left of {bare[1]}" + (f" and {bare[2]}" if len(digits) == 3 else "")
    return [
        f"{side_by_side} in {ink} ink",
        f"{side_by_side} {on}",
        f"the digits {listed} written in {ink} ink",
        f"the digits {listed} written by hand {on}",
        f"the digits {listed} in {ink} ink {on}",
        f"{left_of} in {ink} ink",
        f"the numbers {listed} {on}",
        f"someone wrote the digits {listed} in {ink} ink",
        f"{left_of} {on}",
        f"there is {side_by_side} in {ink} ink",
    ]


def draw_scene(settings: DrawnSource, index: int, split: str) -> Scene:
    """Scene number `index` of the seed: the same bytes on every call."""
    rng = scenes.rng_for("digits", settings.seed, index)
    num = int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2]))
    digits = [int(digit) for digit in rng.permutation(10)[:num]]
    ink, paper = list(INKS)[rng.integers(len(INKS))], list(PAPERS)[rng.integers(len(PAPERS))]
    pixels = _paper(paper, settings.image_px, rng)
    colour = np.array(INKS[ink], np.float32) + rng.uniform(-10, 10, 3).astype(np.float32)
    boxes = []
    for digit, centre in zip(digits, CENTRES[num], strict=True):
        choices = samples_of(digit, split, settings.seed)
        ink_8x8 = handwriting()[0][choices[rng.integers(len(choices))]]
        height_px = int(rng.uniform(*SIZES[num]) * settings.image_px)
        stamp = _stamp(ink_8x8, height_px, int(MAX_WIDTH[num] * settings.image_px))
        x, y = centre + rng.uniform(-0.02, 0.02), 0.5 + rng.uniform(-0.1, 0.1)
        left, top = (
            int(np.clip(v * settings.image_px - length / 2, 0, settings.image_px - length))
            for v, length in zip((x, y), (stamp.shape[1], stamp.shape[0]), strict=True)
        )
        region = pixels[top : top + stamp.shape[0], left : left + stamp.shape[1]]
        region += stamp[..., None] * (colour - region)
        boxes.append(([WORDS[digit]], _stroke_box(stamp, left, top, settings.image_px)))
    captions = scenes.choose_captions(describe(digits, ink, paper), settings.captions_per_image, rng)
    return Scene(scenes.add_noise(pixels, rng.uniform(1, 4), rng), captions, boxes)


def digits_rows(settings: DrawnSource, folder: Path, seed: int) -> list[Row]:
    """Draws `settings.num_images` scenes into `folder`."""
    splits = draw_splits(settings.num_images, settings.val_fraction, settings.test_fraction, settings.seed)
    return scenes.draw_rows("digits", draw_scene, settings, splits, folder)
