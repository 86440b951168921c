"""Views of an image whose features are cached: `VIEWS` is the registry. The plain one is what all but training sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from captioning.errors import CapstanError, unknown_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Image = NDArray[np.uint8]
    View = Callable[[Image], Image]

PLAIN, MIRROR = "plain", "mirror"
"""The name of every mirrored view ends in the second: captions that speak of left and right are not true of it."""
CROP = (7, 8)
"""A crop keeps so many parts of so many of each side: three quarters of the picture, so what captions name stays."""


def _plain(image: Image) -> Image:
    return image


def _mirror(image: Image) -> Image:
    import torch  # here, as the names alone are wanted without it; its flip takes a tenth of numpy's time

    image = image if image.flags.writeable else image.copy()  # torch warns of memory that it may not write to
    return torch.from_numpy(image).flip(1).numpy()


def _crop(image: Image, down: float, right: float) -> Image:
    """`down`, `right`: 0 keeps the upper (left) edge, 1 the lower (right) one."""
    sides = image.shape[:2]
    height, width = (max(1, side * CROP[0] // CROP[1]) for side in sides)
    top, left = int((sides[0] - height) * down), int((sides[1] - width) * right)
    return image[top : top + height, left : left + width]


def _mirrored(view: View, image: Image) -> Image:
    return _mirror(view(image))


_CROPS: dict[str, View] = {
    "center": partial(_crop, down=0.5, right=0.5),
    "top_left": partial(_crop, down=0, right=0),
    "top_right": partial(_crop, down=0, right=1),
    "bottom_left": partial(_crop, down=1, right=0),
    "bottom_right": partial(_crop, down=1, right=1),
}

VIEWS: dict[str, View] = {
    PLAIN: _plain,
    MIRROR: _mirror,
    **_CROPS,
    **{f"{name}_{MIRROR}": partial(_mirrored, view) for name, view in _CROPS.items()},
}
"""Name → function from an HWC uint8 image of any size to another, before the encoder's own resize.

`center` and the corners are crops of 7/8 of each side; `<crop>_mirror` is the crop's mirror image."""


def check_views(names: Sequence[str]) -> None:
    """Raises CapstanError for an unknown name (choices listed), one twice, or another than `plain` first."""
    for name in names:
        if name not in VIEWS:
            raise unknown_name("view", name, VIEWS)
    if not names or names[0] != PLAIN:
        raise CapstanError(
            f"features.views is {list(names)}; {PLAIN!r} must come first: validation and captions use it"
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise CapstanError(f"features.views names {twice[0]!r} more than once")


def look(image: Image, names: Sequence[str]) -> list[Image]:
    """The views of an image, in the order of their names; some share its memory."""
    return [VIEWS[name](image) for name in names]
