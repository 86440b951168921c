"""Attention of a decoder over an image's regions. `ATTENTIONS` is the registry.

Every attention has `keys(regions)`, computed once an image and shared by all its captions or beams, and
`forward(queries, keys, regions)` for any number of queries an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from captioning.errors import CapstanError, unknown_name


class Attention(nn.Module):
    """Base: a subclass scores queries against keys; weights and context follow from the scores."""

    def keys(self, regions: Tensor) -> Tensor:
        """(images, num_regions, region_dim) → what `scores` compares with; by default the regions themselves."""
        return regions

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(images, captions, hidden_dim) → (images, captions, num_regions)."""
        raise NotImplementedError

    def forward(self, queries: Tensor, keys: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Attends once for each query.

        Args:
            queries: (images, captions, hidden_dim).
            keys: `self.keys(regions)`.
            regions: (images, num_regions, region_dim).

        Returns:
            The context (images, captions, region_dim) and the weights (images, captions, num_regions), summing to 1.
        """
        attention_weights = self.scores(queries, keys).softmax(-1)
        return attention_weights @ regions, attention_weights


class _AdditiveScores(torch.autograd.Function):
    """v · tanh(q + k) for every query and key, with a backward pass that reads the tanh three times and writes none.

    Autograd's own would lay out the gradient of the sums, (images, captions, num_regions, attention_dim), three times.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, vector: Tensor) -> Tensor:
        """(images, captions, dim), (images, num_regions, dim), (dim,) → (images, captions, num_regions)."""
        tanh = (queries[:, :, None] + keys[:, None]).tanh_()  # (images, captions, num_regions, dim)
        ctx.save_for_backward(tanh, vector)
        return tanh @ vector

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tanh, vector = ctx.saved_tensors
        dim = tanh.shape[-1]
        for_vector = gradient.reshape(1, -1) @ tanh.reshape(-1, dim)
        slope = torch.addcmul(tanh.new_ones(()), tanh, tanh, value=-1)  # 1 - tanh²
        for_queries = (gradient[:, :, None] @ slope).squeeze(2) * vector
        for_keys = slope[:, 0] * gradient[:, 0, :, None]
        for caption in range(1, slope.shape[1]):
            for_keys.addcmul_(slope[:, caption], gradient[:, caption, :, None])
        return for_queries, for_keys * vector, for_vector.squeeze(0)


class AdditiveAttention(Attention):
    """v · tanh(W_q q + W_k k): Bahdanau et al. 2015, appendix A.1.2; Luong et al. 2015, section 3.1, "concat"."""

    def __init__(self, hidden_dim: int, region_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_dim, attention_dim)
        self.key = nn.Linear(region_dim, attention_dim, bias=False)
        self.score = nn.Linear(attention_dim, 1, bias=False)

    def keys(self, regions: Tensor) -> Tensor:
        return self.key(regions)

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        projected = self.query(queries)
        return _AdditiveScores.apply(projected, keys, self.score.weight[0].to(projected.dtype))


class GeneralAttention(Attention):
    """qᵀ W r (Luong et al. 2015, section 3.1, "general")."""

    def __init__(self, hidden_dim: int, region_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_dim, region_dim, bias=False)

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        return self.query(queries) @ keys.transpose(1, 2)


class DotAttention(Attention):
    """qᵀ r (Luong et al. 2015, section 3.1, "dot"); needs hidden_dim = region_dim."""

    def __init__(self, hidden_dim: int, region_dim: int, attention_dim: int) -> None:
        super().__init__()
        if hidden_dim != region_dim:
            raise CapstanError(
                f"attention luong_dot needs hidden_dim ({hidden_dim}) equal to region_dim ({region_dim}); "
                "set decoder_settings.<name>.region_dim to hidden_dim, or use luong_general"
            )

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        return queries @ keys.transpose(1, 2)


ATTENTIONS: dict[str, Callable[[int, int, int], Attention]] = {
    "bahdanau": AdditiveAttention,
    "luong_dot": DotAttention,
    "luong_general": GeneralAttention,
    "luong_concat": AdditiveAttention,
}


def build_attention(name: str, hidden_dim: int, region_dim: int, attention_dim: int) -> Attention:
    """Raises CapstanError, listing the choices, where the name is unknown."""
    if name not in ATTENTIONS:
        raise unknown_name("attention", name, ATTENTIONS)
    return ATTENTIONS[name](hidden_dim, region_dim, attention_dim)


def stack_steps(steps: list[Tensor]) -> Tensor:
    """Lays the steps' (images_t, captions_t, dim) end to end: (sum of images_t × captions_t, dim)."""
    return torch.cat([step.flatten(0, 1) for step in steps])
