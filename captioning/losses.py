"""Cross entropy over a vocabulary, with a gradient of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        log_probs = logits.log_softmax(-1)
        ctx.smoothing = smoothing
        ctx.save_for_backward(log_probs, targets)
        right = log_probs.gather(1, targets[:, None]).sum()
        return -(1 - smoothing) * right - smoothing * log_probs.sum() / logits.shape[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        log_probs, targets = ctx.saved_tensors
        rows = torch.arange(len(targets), device=targets.device)
        slope = log_probs.exp()
        if ctx.smoothing:
            slope.sub_(ctx.smoothing / log_probs.shape[1])
        slope[rows, targets] -= 1 - ctx.smoothing
        return slope.mul_(gradient), None, None


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The sum over tokens of cross entropy with label smoothing (Szegedy et al. 2016, section 7).

    As torch's, to rounding. Its gradient, softmax less the target's distribution, is made in one tensor of the logits'
    size; autograd's passes over four.

    Args:
        logits: (num_tokens, vocabulary_size), float32 or float64.
        targets: (num_tokens,) int64.
    """
    loss: Tensor = _CrossEntropy.apply(logits, targets, label_smoothing)
    return loss
