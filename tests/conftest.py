"""Small things that many tests need."""

from __future__ import annotations

import os
import random
from typing import Any

# Tensors of tests are tiny: threads would only wait for one another, the longer the busier the machine is. Before torch
# is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from captioning.decoders import Decoder, DecoderConfig, build_decoder

ATTENTION_NAMES = ("bahdanau", "luong_dot", "luong_general", "luong_concat")
PLAIN: dict[str, dict[str, Any]] = {
    f"{kind}-{attention}": {"type": kind, "attention": attention, "context_gate": attention == "bahdanau"}
    for kind in ("lstm", "gru")
    for attention in (*ATTENTION_NAMES, "none")
}
TRANSFORMER: dict[str, Any] = {"type": "transformer", "num_layers": 2, "num_heads": 2, "feedforward_dim": 12}
OPTIONS: dict[str, dict[str, Any]] = {
    "layers": {"num_layers": 3},
    "feeding": {"input_feeding": True},
    "gate": {"context_gate": True},
    "ungated": {"context_gate": False},
    "zeros": {"initial_from_mean": False},
    "tied": {"tied_embeddings": True, "embedding_dim": 8},
    "raw": {"region_dim": None},
    "all": {"num_layers": 2, "input_feeding": True, "context_gate": True, "initial_from_mean": False},
}


def _offers(plain: str, option: str) -> bool:
    """Whether a decoder has an option that changes it; no attention, no feeding and no gate."""
    if plain.endswith("none"):
        return option in ("layers", "zeros", "tied", "raw")
    if plain.endswith("luong_dot"):  # needs equal dimensions
        return option != "raw" and option != "ungated"
    return option != ("gate" if plain.endswith("bahdanau") else "ungated")


VARIANTS: dict[str, dict[str, Any]] = {
    **PLAIN,
    **{f"{n}-{o}": PLAIN[n] | options for n in PLAIN for o, options in OPTIONS.items() if _offers(n, o)},
    "transformer": TRANSFORMER,
    "transformer-learned": TRANSFORMER | {"positions": "learned", "num_positions": 10},
    "transformer-encoder": TRANSFORMER | {"num_encoder_layers": 2, "num_layers": 1},
    "transformer-tied": TRANSFORMER | {"tied_embeddings": True, "num_heads": 1},
}
"""Every decoder with every option, as what differs from `small_decoder`'s config."""


def small_decoder(variant: str = "lstm-bahdanau", vocabulary_size: int = 9, seed: int = 0, **options: Any) -> Decoder:
    """A tiny random decoder in float64 and evaluation mode, with logits far enough apart that no two sequences tie."""
    torch.manual_seed(seed)
    sizes = {"vocabulary_size": vocabulary_size, "encoder_dim": 6, "hidden_dim": 8, "dropout": 0.0}
    recurrent = {"embedding_dim": 5, "attention_dim": 7, "region_dim": 8}
    differing = VARIANTS[variant] | options
    if differing["type"] != "transformer":
        differing = recurrent | differing
    decoder = build_decoder(DecoderConfig(**sizes | differing)).double().eval()
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
