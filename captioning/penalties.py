"""Terms of the training loss beside cross entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from captioning.datasets import Batch
from captioning.decoders import Decoder
from captioning.vocabulary import Vocabulary

if TYPE_CHECKING:
    from captioning.train_params import EosSuppression


def run_with_penalties(
    decoder: Decoder, batch: Batch, suppression: EosSuppression | None
) -> tuple[Tensor, Tensor | None]:
    """Logits as float32, and the weighted sum of all terms that are on, over the batch; None: none is."""
    weight, terms = decoder.config.doubly_stochastic, []
    if weight:
        logits, coverage = decoder.forward_with_coverage(batch)
        terms.append(weight * doubly_stochastic(coverage))
    else:
        logits = decoder(batch)
    logits = logits.float()
    if suppression is not None:
        terms.append(suppression.weight * early_end(logits, batch, suppression.min_length))
    return logits, sum(terms[1:], terms[0]) if terms else None


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
