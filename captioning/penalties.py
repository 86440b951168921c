"""The training loss: cross entropy, and the terms beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captioning.datasets import Batch
from captioning.decoders import Decoder
from captioning.losses import cross_entropy
from captioning.vocabulary import Vocabulary

if TYPE_CHECKING:
    from captioning.evaluation import Tally
    from captioning.train_params import EosSuppression


TOKENS_A_PIECE = 256
"""Of which logits exist at once under gradient checkpointing."""


def loss_sum(
    decoder: Decoder,
    batch: Batch,
    label_smoothing: float,
    suppression: EosSuppression | None,
    tally: Tally | None = None,
) -> Tensor:
    """Cross entropy and the weighted sum of all terms that are on, over the batch's tokens; `tally` gets its logits.

    Where the decoder recomputes, the logits are made, and made again in the backward pass, for some tokens at a time:
    they and their probabilities, each vocabulary_size numbers a token, are the largest tensors of all.
    """
    weight = decoder.config.doubly_stochastic
    vectors, coverage = decoder.read_with_coverage(batch) if weight else (decoder.read(batch), None)

    def of_tokens(vectors: Tensor, part: Batch, tally: Tally | None = None) -> Tensor:
        logits = decoder.output(vectors).float()
        if tally is not None:
            tally.add(logits.detach(), part.packed_targets)
        with torch.autocast(logits.device.type, enabled=False):
            total = cross_entropy(logits, part.packed_targets, label_smoothing)
            if suppression is not None:
                total = total + suppression.weight * early_end(logits, part, suppression.min_length)
        return total

    if not decoder.recomputes:
        total = of_tokens(vectors, batch, tally)
    else:
        pieces = list(zip(vectors.split(TOKENS_A_PIECE), _split(batch), strict=True))
        total = torch.stack([decoder.run_part(of_tokens, *piece) for piece in pieces]).sum()
        if tally is not None:  # not within, where it would count twice
            with torch.no_grad():
                for piece in pieces:
                    of_tokens(*piece, tally)
    return total if coverage is None else total + weight * doubly_stochastic(coverage)


def _split(batch: Batch) -> Iterator[Batch]:
    """The batch with `TOKENS_A_PIECE` of its tokens at a time, as far as the loss reads it."""
    for start in range(0, batch.num_tokens, TOKENS_A_PIECE):
        piece = slice(start, start + TOKENS_A_PIECE)
        yield replace(batch, places=batch.places[piece], packed_targets=batch.packed_targets[piece])


def doubly_stochastic(coverage: Tensor) -> Tensor:
    """How far each region's attention, summed over a caption, is from 1: squared, and summed over regions and captions
    (Xu et al. 2015, equation 14). `coverage`: (captions, num_regions)."""
    return (1 - coverage.float()).square().sum()


def early_end(logits: Tensor, batch: Batch, min_length: int) -> Tensor:
    """−log(1 − P(eos)), summed over the tokens before which a caption has less than `min_length` words and which are
    not eos themselves: the unlikelihood (Welleck et al. 2020, equation 4) of an end that comes too early.

    Args:
        logits: (num_tokens, vocabulary_size) float32, for `batch.packed_targets`.
    """
    position = batch.places % batch.targets.shape[-1]
    early = (position < min_length) & (batch.packed_targets != Vocabulary.eos_id)
    found = logits[early]
    others = found.index_fill(-1, found.new_tensor([Vocabulary.eos_id]).long(), -float("inf"))
    return (found.logsumexp(-1) - others.logsumexp(-1)).sum()
