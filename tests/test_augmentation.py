"""Augmentation: what it draws depends on (seed, epoch, image_id) alone, and captions stay true of what it makes."""

from __future__ import annotations

import colorsys
import hashlib
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning import augmentation
from captioning.augmentation import CHANGES, NUM_DRAWS, Augmenter, mentions_side, survives_mirror
from captioning.train_params import AugmentationParams

ROOT = Path(__file__).parents[1]
NEVER, ALWAYS = dict.fromkeys(CHANGES, 0.0), dict.fromkeys(CHANGES, 1.0)

sides = st.integers(1, 70)
unit = st.floats(0, 1)
draws = st.lists(st.floats(0, 1, exclude_max=True), min_size=NUM_DRAWS, max_size=NUM_DRAWS).map(np.array)


def augmenter(
    seed: int = 1, num_steps: int = 100, start: float = 0.05, end: float = 1.0, **chances: float
) -> Augmenter:
    chosen = AugmentationParams(start_strength=start, end_strength=end, **{**NEVER, **chances})
    return Augmenter(chosen, seed, num_steps)


def photo(height: int = 96, width: int = 128, seed: int = 0) -> np.ndarray:
    """Smooth coloured patches with some grain: blur, hue and crops all show."""
    rng = np.random.default_rng(seed)
    patches = np.kron(rng.integers(30, 226, (12, 16, 3)), np.ones((height // 12 + 1, width // 16 + 1, 1)))
    image = patches[:height, :width] + rng.integers(-20, 21, (height, width, 3))
    image = image.astype(np.uint8)
    image.setflags(write=False)
    return image


def change(before: np.ndarray, after: np.ndarray) -> float:
    """Mean over pixels, in levels of 255; the image is brought to the first one's size by its nearest pixels."""
    rows = np.arange(before.shape[0]) * after.shape[0] // before.shape[0]
    columns = np.arange(before.shape[1]) * after.shape[1] // before.shape[1]
    return float(np.abs(before.astype(int) - after[rows][:, columns].astype(int)).mean())


def digest(images: list[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(repr(image.shape).encode() + image.tobytes() for image in images)).hexdigest()


def test_every_change_has_a_probability():
    assert set(CHANGES) == set(AugmentationParams.model_fields) - {"start_strength", "end_strength"}


def test_strength_grows_by_the_same_factor_at_each_step():
    grow = augmenter(start=0.1, end=0.9, num_steps=5)
    strengths = [grow.strength(step) for step in range(5)]
    assert strengths[0] == 0.1 and strengths[-1] == pytest.approx(0.9) and grow.strength(50) == strengths[-1]
    ratios = [after / before for before, after in zip(strengths, strengths[1:], strict=False)]
    assert ratios == pytest.approx([9**0.25] * 4)
    assert augmenter(start=0.1, end=0.9, num_steps=1).strength(0) == 0.1


@settings(deadline=None)
@given(sides, sides, unit, st.booleans(), st.integers(-5, 5), st.text(max_size=8))
def test_any_image_gives_an_image(height, width, strength, may_flip, epoch, image_id):
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    before = image.copy()
    after = augmenter(**ALWAYS)(image, epoch, image_id, strength, may_flip)
    assert after.dtype == np.uint8 and after.ndim == 3 and after.shape[2] == 3
    assert 1 <= after.shape[0] <= height and 1 <= after.shape[1] <= width
    assert np.array_equal(image, before)


@settings(deadline=None)
@given(sides, sides, unit, st.integers(0, 5))
def test_no_probabilities_or_no_strength_is_the_identity(height, width, strength, epoch):
    image = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    assert np.array_equal(augmenter()(image, epoch, "a", strength, True), image)
    assert np.array_equal(augmenter(**ALWAYS)(image, epoch, "a", 0.0, True), image)


@settings(deadline=None)
@given(draws, unit)
def test_crops_keep_most_of_the_image(draws, strength):
    """Also that the stretched crop fits: it has the area that was drawn, but for rounding to pixels."""
    height, width = augmentation.crop(np.zeros((300, 400, 3), np.uint8), draws, strength).shape[:2]
    kept = 1 - augmentation.CROPPED_AREA * strength * draws[0]
    assert height * width / (300 * 400) == pytest.approx(kept, abs=0.006)
    assert (
        1 / augmentation.STRETCH**strength - 0.01
        <= (width / 400) / (height / 300)
        <= augmentation.STRETCH**strength + 0.01
    )


@settings(deadline=None)
@given(draws, unit)
def test_holes_are_small_and_inside(draws, strength):
    image = np.full((200, 300, 3), 7, np.uint8)
    after = augmentation.cutout(image, draws, strength)
    largest = augmentation.NUM_HOLES * (0.15 * strength * 200 + 1) * (0.15 * strength * 300 + 1)
    assert after.shape == image.shape and np.count_nonzero((after != 7).any(axis=2)) <= largest
    if strength == 1:
        assert np.count_nonzero((after != 7).any(axis=2)) >= 0.07 * 200 * 0.07 * 300


COLOURS = [(200, 30, 30), (30, 160, 60), (40, 60, 200), (150, 60, 190), (240, 220, 120), (90, 90, 90), (230, 230, 230)]


@pytest.mark.parametrize("rgb", COLOURS)
def test_colours_keep_their_names(rgb):
    """In the corners of what is drawn. Red and orange are 30 degrees apart; clipping bright colours moves hues, too."""
    hue, saturation, _ = colorsys.rgb_to_hsv(*rgb)
    for corner in range(16):
        draws = np.array([(corner >> bit & 1) * 0.999 for bit in range(4)])
        pixel = augmentation.colour(np.full((8, 8, 3), rgb, np.uint8), draws, 1.0)[0, 0]
        new_hue, new_saturation, _ = colorsys.rgb_to_hsv(*pixel.tolist())
        assert (new_saturation < 0.02) if saturation == 0 else (new_saturation > 0.4 * saturation)
        if saturation:
            assert abs((new_hue - hue + 0.5) % 1 - 0.5) * 360 <= 20


@pytest.mark.parametrize("name", [*CHANGES, "all"])
def test_change_grows_with_strength(name):
    """Over many images: probability and magnitude both grow."""
    augment = augmenter(**(ALWAYS if name == "all" else {name: 1.0}))
    images = [photo(seed=seed) for seed in range(60)]
    means = [
        np.mean([change(image, augment(image, 0, f"image{i}", s, True)) for i, image in enumerate(images)])
        for s in (0, 0.02, 0.4, 0.7, 1)
    ]
    assert means[0] == 0 and all(before < after for before, after in zip(means[1:], means[2:], strict=False))
    assert means[1] < 0.1 * means[-1]


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "flip"])
def test_a_change_goes_further_with_strength(name):
    """The same draws, so probability plays no part."""
    rng = np.random.default_rng(4)
    table = [rng.random(NUM_DRAWS) for _ in range(20)]
    means = [
        np.mean([change(photo(seed=i), CHANGES[name](photo(seed=i), draws, s)) for i, draws in enumerate(table)])
        for s in (0, 0.02, 0.4, 0.7, 1)
    ]
    assert means[0] == 0 and means[1] < means[2] < means[3] < means[4] and means[1] < 0.35 * means[4]


def test_a_stronger_call_makes_the_same_changes_and_more():
    augment = augmenter(**ALWAYS)
    for i in range(40):
        changed = [not np.array_equal(photo(), augment(photo(), 0, f"{i}", s, True)) for s in (0, 0.3, 0.6, 1)]
        assert changed == sorted(changed)


def test_probabilities():
    """Each at its own, scaled by strength, and one without the other."""
    augment, image = augmenter(flip=0.5, colour=0.5), photo()
    kinds = []
    for i in range(400):
        after = augment(image, 0, str(i), 0.8, True)
        is_flipped = change(image[:, ::-1], after) < change(image, after)
        kinds.append((is_flipped, not np.array_equal(after, image[:, ::-1] if is_flipped else image)))
    share = np.mean(kinds, axis=0)
    assert np.all(np.abs(share - 0.4) < 0.08)
    assert abs(np.mean([both == (True, True) for both in kinds]) - 0.16) < 0.06


def test_draws_depend_on_seed_epoch_and_image():
    image, first = photo(), augmenter(**ALWAYS)
    results = [
        first(image, 0, "a", 1.0, True),
        first(image, 1, "a", 1.0, True),
        first(image, 0, "b", 1.0, True),
        augmenter(seed=2, **ALWAYS)(image, 0, "a", 1.0, True),
    ]
    assert len({digest([result]) for result in results}) == 4
    again = augmenter(num_steps=7, **ALWAYS)(image, 0, "a", 1.0, True)
    assert np.array_equal(results[0], again)


def test_one_change_does_not_move_the_draws_of_another():
    image = photo()
    alone = augmenter(crop=1.0)(image, 0, "a", 1.0, False)
    with_flip = augmenter(crop=1.0, flip=1.0)(image, 0, "a", 1.0, True)
    assert np.array_equal(alone[:, ::-1], with_flip) and not np.array_equal(alone, with_flip)


def test_global_random_state_is_neither_read_nor_changed():
    augment = augmenter(**ALWAYS)
    random.seed(1)
    np.random.seed(1)
    states = random.getstate(), repr(np.random.get_state())
    first = augment(photo(), 0, "a", 1.0, True)
    assert (random.getstate(), repr(np.random.get_state())) == states
    random.seed(2)
    np.random.seed(2)
    assert np.array_equal(first, augment(photo(), 0, "a", 1.0, True))


def make_all(augment: Augmenter, order: list[int]) -> list[np.ndarray]:
    """Images 0 to 31 of epoch 3, made in `order` by eight threads."""
    with ThreadPoolExecutor(8) as pool:
        made = {i: pool.submit(augment, photo(seed=i), 3, f"set/{i}", 1.0, i % 2 > 0) for i in order}
    return [made[i].result() for i in range(32)]


def test_same_pixels_in_any_thread_and_order():
    augment = augmenter(**ALWAYS)
    serial = [augment(photo(seed=i), 3, f"set/{i}", 1.0, i % 2 > 0) for i in range(32)]
    assert len({digest([image]) for image in serial}) == 32
    for attempt in range(5):
        assert digest(make_all(augment, random.Random(attempt).sample(range(32), 32))) == digest(serial)


IN_ANOTHER_PROCESS = """
import socket
def no_network(*args, **kwargs): raise SystemExit("asked the network")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = no_network
import captioning.augmentation, sys
assert not {"albumentations", "cv2", "scipy"} & set(sys.modules), "imported before it is used"
from test_augmentation import ALWAYS, augmenter, digest, make_all
made = make_all(augmenter(**ALWAYS), list(range(31, -1, -1)))
import cv2
assert cv2.getNumThreads() == 1
print(digest(made))
"""


def test_same_pixels_in_another_process_without_network():
    """Albumentations asks PyPI for its newest version on import unless told not to."""
    environment = {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"}
    environment |= {"PYTHONHASHSEED": "5", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest(make_all(augmenter(**ALWAYS), list(range(32))))


def test_flips_only_what_may_be_flipped():
    augment, image = augmenter(flip=1.0), photo()
    assert np.array_equal(augment(image, 0, "a", 1.0, True), image[:, ::-1])
    assert np.array_equal(augment(image, 0, "a", 1.0, False), image)


@pytest.mark.parametrize(
    "caption",
    [
        "a red square to the left of a green circle",
        "the cross on the RIGHT.",
        "a man, right, throws a ball",
        "the leftmost horse in the upper-right corner",
        "a glove on his left hand",
        "a left-handed batter",
        "on the righthand side",
        "skaters go counterclockwise",
    ],
)
def test_captions_with_sides(caption):
    assert mentions_side(["a dog", caption]) and not survives_mirror(["a dog", caption])


@pytest.mark.parametrize(
    "caption",
    [
        "a bright light",
        "an upright piano in a theft alarm",
        "a large red triangle over a small purple cross",
        "a number of people ride already",
        "a swordfish in context",
        "",
    ],
)
def test_captions_without_sides(caption):
    assert not mentions_side([caption]) and survives_mirror([caption])


@pytest.mark.parametrize(
    "caption",
    [
        "the digits four, seven and nine in blue ink",
        "a handwritten three on yellow paper",
        "a sign that reads stop",
        "a wall with words written on it",
    ],
)
def test_writing_does_not_survive_the_mirror(caption):
    assert not mentions_side([caption]) and not survives_mirror(["a dog", caption])


def test_no_captions_survive():
    assert not mentions_side([]) and survives_mirror([])
