"""Random changes to training images in live mode: crop, flip, colour, blur, cutout.

Albumentations changes the pixels; how much is drawn here. Its own generators belong to its transforms: threads that
share one disturb each other (with four threads, 24 of 50 images differed), and `Compose.set_random_seed` gives every
transform the same seed, so that all of them would apply to the same images.

Limits are chosen so that captions stay true. In 800 drawn images at full strength, a crop took more than half of 0.3 %
of the objects, a cutout more than 40 % of none; colours keep their names.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from functools import cache
from math import ceil, exp, log, sqrt
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from captioning.train_params import AugmentationParams

Pixels = NDArray[np.uint8]
"""(height, width, 3) RGB."""
Draws = NDArray[np.float64]
"""Uniform in [0, 1), one for each random choice that a change makes."""

# At full strength:
CROPPED_AREA = 0.3
"""Up to this share of the area is cropped away."""
STRETCH = 1.2
"""A crop's aspect ratio is up to this factor from the image's."""
BRIGHTNESS = CONTRAST = SATURATION = 0.2
"""Factors are in [0.8, 1.2]."""
HUE_DEGREES = 8
"""Of 360, either way. More would turn red into orange, and captions name colours."""
BLUR = 0.01
"""Standard deviation of the Gaussian, as a share of the shorter side."""
NUM_HOLES, HOLE = 2, 0.15
"""Holes of a cutout, and their longest side as a share of the image's."""

NUM_DRAWS = 4 * NUM_HOLES + 1

SIDE = re.compile(
    r"\b(?:top|bottom|upper|lower)?[ -]?(?:left|right)(?:y|most|wards?|[ -]?hand(?:ed|er|side)?|side)?\b"
    r"|\b(?:anti|counter)?-?clockwise\b",
    re.IGNORECASE,
)
WRITING = re.compile(
    r"\b(?:hand)?(?:writ(?:es?|ings?|ten)|wrote)\b"
    r"|\b(?:digit|letter|numeral|number(?! of)|word)(?:s|ed|ing)?\b"
    r"|\b(?:reads?|says?|saying|spells?|spelling|spelt|text)\b",
    re.IGNORECASE,
)


class _Functions(NamedTuple):
    """Albumentations' modules of functions; these have no state."""

    blur: ModuleType
    crops: ModuleType
    dropout: ModuleType
    flips: ModuleType
    pixels: ModuleType


@cache
def _albumentations() -> _Functions:
    """Takes a second the first time in each process."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it asks PyPI for its newest version on import
    import albucore
    import cv2
    from albumentations.augmentations import functional as pixels
    from albumentations.augmentations.blur import functional as blur
    from albumentations.augmentations.crops import functional as crops
    from albumentations.augmentations.dropout import functional as dropout

    cv2.setNumThreads(0)  # each image in its caller's thread: OpenCV's own would compete with torch's
    return _Functions(blur, crops, dropout, albucore, pixels)


def crop(image: Pixels, draws: Draws, strength: float) -> Pixels:
    """A random resized crop (Szegedy et al. 2014, section 6), which the encoder's transform resizes."""
    area = 1 - CROPPED_AREA * strength * draws[0]
    # A crop of this area fits the image if it is stretched by no more than 1 / area.
    log_stretch = (2 * draws[1] - 1) * min(strength * log(STRETCH), -log(area))
    height, width = image.shape[:2]
    shape = (round(height * sqrt(area / exp(log_stretch))), round(width * sqrt(area * exp(log_stretch))))
    shape = (max(1, shape[0]), max(1, shape[1]))
    crops = _albumentations().crops
    box = crops.get_crop_coords((height, width), shape, draws[2], draws[3])
    return np.ascontiguousarray(crops.crop(image, *box))


def flip(image: Pixels, draws: Draws, strength: float) -> Pixels:
    """The mirror image; it knows no less or more."""
    return _albumentations().flips.hflip_cv2(image)


def colour(image: Pixels, draws: Draws, strength: float) -> Pixels:
    """Brightness, contrast, saturation and hue, in this order."""
    pixels, shifts = _albumentations().pixels, strength * (2 * draws - 1)
    image = pixels.adjust_brightness_torchvision(image, 1 + BRIGHTNESS * shifts[0])
    image = pixels.adjust_contrast_torchvision(image, 1 + CONTRAST * shifts[1])
    image = pixels.adjust_saturation_torchvision(image, 1 + SATURATION * shifts[2])
    # OpenCV's unit of hue is two degrees.
    return pixels.shift_hsv(image, round(HUE_DEGREES / 2 * shifts[3]), 0, 0)


def blur(image: Pixels, draws: Draws, strength: float) -> Pixels:
    """Gaussian, as from a lens out of focus."""
    sigma = BLUR * min(image.shape[:2]) * strength * draws[0]
    return _albumentations().blur.gaussian_blur(image, 2 * ceil(3 * sigma) + 1, sigma)


def cutout(image: Pixels, draws: Draws, strength: float) -> Pixels:
    """Holes of noise (Zhong et al. 2017, "Random erasing", RE-R): no plain colour, which could pass for an object."""
    sides = np.array(image.shape[:2])
    sizes, places = draws[:-1].reshape(2, NUM_HOLES, 2)
    sizes = np.round(sides * HOLE * strength * (0.5 + 0.5 * sizes)).astype(int)
    starts = ((sides - sizes + 1) * places).astype(int)
    holes = np.concatenate([starts[:, ::-1], (starts + sizes)[:, ::-1]], axis=1)  # (num_holes, 4): x0, y0, x1, y1
    noise = np.random.default_rng(int(draws[-1] * 2**53))
    return _albumentations().dropout.cutout(image, holes, "random", noise)


CHANGES: dict[str, Callable[[Pixels, Draws, float], Pixels]] = {
    "crop": crop,
    "flip": flip,
    "colour": colour,
    "blur": blur,
    "cutout": cutout,
}
"""In the order of application, by the name of their probability in `AugmentationParams`."""


class Augmenter:
    """Changes training images, from hardly at a run's start to fully at its end. Threads may share one."""

    def __init__(self, settings: AugmentationParams, seed: int, num_steps: int) -> None:
        """`num_steps` are the optimizer steps of the whole run."""
        assert num_steps > 0
        self.settings, self.seed, self.num_steps = settings, seed, num_steps
        _albumentations()  # here rather than in the threads at the first step

    def strength(self, step: int) -> float:
        """start_strength * (end_strength / start_strength) ** (step / (num_steps - 1)): grows by the same factor at
        each step. `step` counts from 0; after the last step it stays at end_strength."""
        start, end = self.settings.start_strength, self.settings.end_strength
        progress = min(1.0, step / max(1, self.num_steps - 1))
        return start * (end / start) ** progress

    def __call__(self, image: Pixels, epoch: int, image_id: str, strength: float, may_flip: bool) -> Pixels:
        """A changed image, or `image` itself; its pixels are never written to.

        Each change has `strength` times its probability, and goes as far as `strength` times its limit. What is drawn
        depends on (seed, epoch, image_id) alone; a stronger call makes the same changes, further, and perhaps more.

        Args:
            image: (height, width, 3) uint8 RGB of any size.
            strength: in [0, 1]; 0 changes nothing.
            may_flip: whether the image's captions are true of its mirror image: see `survives_mirror`.

        Returns:
            uint8 RGB of another size where it was cropped: the encoder's transform resizes it.
        """
        assert 0 <= strength <= 1 and image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
        table = self._generator(epoch, image_id).random((len(CHANGES), 1 + NUM_DRAWS))
        for (name, change), (chance, *_), draws in zip(CHANGES.items(), table, table[:, 1:], strict=True):
            if chance < strength * getattr(self.settings, name) and (may_flip or name != "flip"):
                image = change(image, draws, strength)
        return image

    def _generator(self, epoch: int, image_id: str) -> np.random.Generator:
        key = hashlib.sha256(repr((self.seed, epoch, image_id)).encode()).digest()
        return np.random.default_rng(int.from_bytes(key[:16], "big"))


def mentions_side(captions: Iterable[str]) -> bool:
    """Whether a caption has a word for left or right (or clockwise). Other meanings of these words count, too: "right
    behind" costs an image its mirror image, and no more."""
    return any(SIDE.search(caption) for caption in captions)


def survives_mirror(captions: Iterable[str]) -> bool:
    """Whether the captions are as true of the mirror image: none mentions a side, digits, letters or writing."""
    captions = list(captions)
    return not mentions_side(captions) and not any(WRITING.search(caption) for caption in captions)
