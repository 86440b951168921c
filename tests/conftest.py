"""Small things that many tests need."""

from __future__ import annotations

import random

import pytest
import torch

from captioning.decoders import Decoder, DecoderConfig, build_decoder

ATTENTION_NAMES = ("bahdanau", "luong_dot", "luong_general", "luong_concat")
ALL_DECODERS = [(kind, attention) for kind in ("lstm", "gru") for attention in ATTENTION_NAMES]


def small_decoder(
    kind: str = "lstm", attention: str = "bahdanau", vocabulary_size: int = 9, seed: int = 0, region_dim: int | None = 8
) -> Decoder:
    """A tiny random decoder in float64 and evaluation mode, with logits far enough apart that no two sequences tie."""
    torch.manual_seed(seed)
    config = DecoderConfig(kind, attention, vocabulary_size, 6, 5, 8, 7, region_dim, 0.0)
    decoder = build_decoder(config).double().eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.8)
    return decoder


def random_captions(num_images: int, vocabulary_size: int, seed: int = 0, longest: int = 9) -> list[list[list[int]]]:
    """Word ids for one to five captions an image, of zero to `longest` words."""
    draw = random.Random(seed)
    return [
        [
            [draw.randrange(4, vocabulary_size) for _ in range(draw.randint(0, longest))]
            for _ in range(draw.randint(1, 5))
        ]
        for _ in range(num_images)
    ]


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
