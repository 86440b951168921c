"""Draws words from a decoder's distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ban(logits: Tensor, banned: Sequence[int]) -> Tensor:
    """Float32 logits (…, vocabulary_size) with minus infinity for words that are never said."""
    return logits.float().index_fill(-1, torch.tensor(banned, device=logits.device), -torch.inf)


def draw_words(logits: Tensor, banned: Sequence[int]) -> Tensor:
    """A word for each row, (rows, vocabulary_size) → (rows,), with torch's generator.

    Where logits are not finite it is any allowed word: the loss of such a step is not finite either, so the step is
    skipped and counted, as it would be without draws.
    """
    probabilities = ban(logits, banned).softmax(-1)
    uniform = ban(logits.new_zeros(logits.shape[-1]), banned).softmax(-1)
    is_finite = probabilities.isfinite().all(-1, keepdim=True)
    return torch.multinomial(torch.where(is_finite, probabilities, uniform), 1)[:, 0]
