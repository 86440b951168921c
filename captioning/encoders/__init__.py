"""Image encoders: networks that turn pixels into a grid of region features. `ENCODERS` is the registry.

`fuse_encoder` gives an encoder's equal for a CPU, several times as fast.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from captioning.encoders.base import REVISION, Encoder, Transform
from captioning.encoders.fused import fuse_encoder
from captioning.encoders.lite import IMAGE_PX, build_lite
from captioning.encoders.torchvision_networks import NAMES, build_torchvision
from captioning.errors import CapstanError, unknown_name

__all__ = [
    "ENCODERS", "IMAGENET", "REVISION", "Encoder", "Transform",
    "build_encoder", "check_encoder", "fuse_encoder", "rebuild_encoder",
]  # fmt: skip

IMAGENET = Transform(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

ENCODERS: dict[str, Callable[[str, str, str], tuple[nn.Module, Transform, str]]] = {
    **dict.fromkeys(IMAGE_PX, build_lite),
    **dict.fromkeys(NAMES, build_torchvision),
}
"""Name → builder of (backbone, transform, digest of the weights), which takes the name, the weights and their param."""
MISNOMERS = {"densenet156": "densenet161"}
"""Names that circulate, though no network has them."""


def check_encoder(name: str) -> None:
    """Raises CapstanError, listing the choices, unless the name is registered."""
    if name in MISNOMERS:
        raise CapstanError(f"unknown encoder {name!r}: no such network exists. Did you mean {MISNOMERS[name]!r}?")
    if name not in ENCODERS:
        raise unknown_name("encoder", name, ENCODERS)


def build_encoder(name: str, weights: str, grid: Sequence[int] | None = None, class_token: bool = False) -> Encoder:
    """Builds a frozen encoder.

    Args:
        weights: `package`, `hub`, `random` or a path; see `encoder_settings` in params.yaml.
        grid: (height, width) to pool the regions to, by adaptive average pooling; None keeps the network's own.
        class_token: keep a vision transformer's class token as one more region, before the others. Networks without
            one are as they are.

    Raises:
        CapstanError: unknown name (choices listed), weights missing, damaged or of another architecture.
    """
    check_encoder(name)
    param = f"encoder_settings.{name}.weights"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if weights == "random":
            torch.manual_seed(0)  # the same untrained network in every stage
        backbone, transform, digest = ENCODERS[name](name, weights, param)
    return Encoder(name, backbone, transform, digest, grid, class_token)


def rebuild_encoder(description: dict[str, Any]) -> Encoder:
    """The architecture that `Encoder.describe()` described, with random weights: to load stored ones into."""
    grid = None if description["pooled_from"] is None else description["grid"]
    return build_encoder(description["name"], "random", grid, description["class_token"])
