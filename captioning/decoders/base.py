"""What beam search, training and attention maps know of a decoder, whichever it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captioning.datasets import Batch

Result = TypeVar("Result")
State = tuple[Tensor, ...]
"""What a decoder carries from step to step; every tensor is (images, beams, …), so that beams can be picked."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder's architecture: all that is needed to rebuild it and load its weights.

    Types share one flat record, which JSON holds as it is; what a type has not stays at its default. The fields are
    explained in `captioning.decoder_params`, which refuses what does not go together.
    """

    type: str
    vocabulary_size: int
    encoder_dim: int
    hidden_dim: int
    num_layers: int = 1
    tied_embeddings: bool = False
    dropout: float
    # Recurrent decoders
    attention: str = "none"
    embedding_dim: int = 0
    embeddings: str | None = None
    attention_dim: int | None = None
    region_dim: int | None = None
    input_feeding: bool = False
    context_gate: bool = False
    initial_from_mean: bool = True
    doubly_stochastic: float = 0.0
    # Transformers
    num_heads: int = 0
    feedforward_dim: int = 0
    num_encoder_layers: int = 0
    positions: str = "sinusoidal"
    num_positions: int | None = None


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
    max_steps: int | None = None
    """Longest caption it can read, bos counted; None: any."""
    output: nn.Module
    """What makes logits of what `read` gives."""
    compiled: tuple[str, ...] = ()
    """Methods that `train.compile` compiles: without loops over steps, each caption's length would be other code."""
    checkpointed = False
    """Gradient checkpointing: the backward pass computes again what the forward pass would else have to keep."""

    def begin_epoch(self, epoch: int) -> None:
        """Called before an epoch's first batch, also where a run goes on in its middle: a pure function of `epoch`."""

    def parts_to_compile(self) -> list[tuple[nn.Module, str, bool]]:
        """Modules, methods of theirs, and whether their inputs' sizes vary from batch to batch."""
        return [(self, name, True) for name in self.compiled]

    def forward(self, batch: Batch) -> Tensor:
        """Logits (num_tokens, vocabulary_size) for `batch.packed_targets`."""
        logits: Tensor = self.output(self.read(batch))
        return logits

    def read(self, batch: Batch) -> Tensor:
        """(num_tokens, hidden_dim), of which the output layer makes the logits."""
        raise NotImplementedError

    def read_with_coverage(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`read`, and how much attention each region got over a caption's words: (num_captions, num_regions), float32
        at least. For `penalties.doubly_stochastic`; decoders whose settings have that key offer it."""
        raise NotImplementedError

    @property
    def recomputes(self) -> bool:
        return self.checkpointed and torch.is_grad_enabled()

    def run_part(self, part: Callable[..., Result], *inputs: object) -> Result:
        """part(*inputs); where the decoder recomputes, only the inputs are kept for the backward pass, which runs the
        part again, with the same random numbers."""
        if not self.recomputes:
            return part(*inputs)
        result: Result = checkpoint(part, *inputs, use_reentrant=False)
        return result

    def chunks(self, num_steps: int) -> list[slice]:
        """Of a caption's steps, each for a `run_part`: what is kept between chunks and what a chunk needs while it is
        computed again balance at √num_steps of them (Chen et al. 2016, section 4). Else one."""
        length = ceil(num_steps**0.5) if self.recomputes else num_steps
        return [slice(start, min(start + length, num_steps)) for start in range(0, num_steps, length)]

    def remember(self, features: Tensor) -> tuple[Memory, State]:
        """(images, num_regions, encoder_dim) of any float type → the images' memory and the state before the
        first word, one beam."""
        raise NotImplementedError

    def step(self, memory: Memory, state: State, token_ids: Tensor) -> Step:
        """Reads one word for each beam, token_ids (images, beams), and scores the next."""
        raise NotImplementedError


def lay_out(packed: Tensor, batch: Batch) -> Tensor:
    """(num_tokens, dim) in the order of `batch.places` → (images, captions, steps, dim), zeros where no token is."""
    laid_out = packed.new_zeros(batch.targets.numel(), packed.shape[1]).index_copy(0, batch.places, packed)
    return laid_out.view(*batch.targets.shape, -1)
