"""What beam search, training and attention maps know of a decoder, whichever it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from captioning.datasets import Batch

State = tuple[Tensor, ...]
"""What a decoder carries from step to step; every tensor is (images, beams, …), so that beams can be picked."""


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder's architecture: all that is needed to rebuild it and load its weights."""

    type: str
    attention: str
    vocabulary_size: int
    encoder_dim: int
    embedding_dim: int
    hidden_dim: int
    attention_dim: int
    region_dim: int | None
    dropout: float


class Memory(NamedTuple):
    """What an image contributes to every step, computed once and shared by its captions or beams."""

    regions: Tensor  # (images, num_regions, region_dim)
    keys: Tensor  # (images, num_regions, …)


class Step(NamedTuple):
    """One word further."""

    logits: Tensor  # (images, beams, vocabulary_size)
    attention_weights: Tensor  # (images, beams, num_regions)
    state: State


class Decoder(nn.Module):
    """A captioning decoder.

    `forward` runs whole captions (teacher forcing), `remember` and `step` run word by word (search); both give the
    same logits, which a test holds for every entry of the registry.
    """

    config: DecoderConfig

    def begin_epoch(self, epoch: int) -> None:
        """Called before an epoch's first batch, also where a run goes on in its middle: a pure function of `epoch`."""

    def forward(self, batch: Batch) -> Tensor:
        """Logits (num_tokens, vocabulary_size) for `batch.packed_targets`."""
        raise NotImplementedError

    def remember(self, features: Tensor) -> tuple[Memory, State]:
        """(images, num_regions, encoder_dim) of any float type → the images' memory and the state before the
        first word, one beam."""
        raise NotImplementedError

    def step(self, memory: Memory, state: State, token_ids: Tensor) -> Step:
        """Reads one word for each beam, token_ids (images, beams), and scores the next."""
        raise NotImplementedError
