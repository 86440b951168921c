"""Encoders for a CPU, several times as fast."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from captioning.encoders.base import Encoder
from captioning.precision import fuse


def fuse_encoder(encoder: Encoder, batch_size: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """An encoder's equal for a CPU, several times as fast; see `precision.fuse`. The encoder itself stays as it is.

    In float32 features differ by rounding alone (1e-5). In bfloat16 other weights are rounded: features differ by as
    much as bfloat16 does from float32.

    Raises:
        ValueError: the network is of a kind that fusing does not help or cannot do; it says why.
    """
    network = copy.deepcopy(encoder.backbone).cpu()
    network.checkpointed = False
    turned = _turn(network)
    image_px = encoder.transform.image_px
    example = torch.zeros(batch_size, image_px, image_px, 3, dtype=dtype).permute(0, 3, 1, 2)
    fused = fuse(network, example)

    def encode(pixels: Tensor) -> Tensor:
        """(batch, image_px, image_px, 3) uint8 → (batch, num_regions, encoder_dim) of `dtype`."""
        pixels = pixels.flip(1, 2) if turned else pixels
        maps = fused(encoder.transform.normalise(pixels).to(dtype))  # (batch, encoder_dim, height, width)
        return encoder.to_regions(maps.flip(2, 3) if turned else maps)

    return encode


def _turn(network: nn.Module) -> bool:
    """Turns a network by 180° in place, if its convolutions pad as TensorFlow's do: more below and right than above.

    torch's cannot, so the package copies every such input into a larger one (a tenth of the time). Turned, more is
    padded above and left, and there padding all sides alike does the same: no stride reaches what is added elsewhere.
    """
    padded: list[Any] = [m for m in network.modules() if isinstance(getattr(m, "static_padding", None), nn.ZeroPad2d)]
    for convolution in padded:
        left, right, top, bottom = convolution.static_padding.padding
        assert (left, right) == (top, bottom) and right - left in (0, 1), convolution
        convolution.padding, convolution.static_padding = (right, right), nn.Identity()
    for module in network.modules():
        if padded and isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.flip(2, 3)
    return bool(padded)
