"""Attention of a decoder over an image's regions. `ATTENTIONS` is the registry.

Every attention has `keys(regions)`, computed once an image and shared by all its captions or beams, and
`forward(queries, keys, regions)` for any number of queries an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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


EXPONENT = 40.0
"""Where exponents are cut: at |x| = 20 tanh has long been ±1, and products of two exponentials stay finite.
Only where q and k are both beyond, with opposite signs, does tanh(q + k) become another."""


def exponential(projected: Tensor) -> Tensor:
    """exp(2x), of which tanh(q + k) = 1 - 2 / (1 + exp(2q) exp(2k)) is made: one exponential for each query and one for
    each key instead of a tanh for each pair. Float32 at least: near 1/2, where `distances` begin, half formats are much
    coarser than near tanh's 0, and float16 has not the range."""
    if projected.dtype in (torch.float16, torch.bfloat16):
        projected = projected.float()
    return (2 * projected).clamp(-EXPONENT, EXPONENT).exp()


def distances(queries: Tensor, keys: Tensor, out: Tensor | None = None) -> Tensor:
    """(1 - tanh(q + k)) / 2 of exp(2q) (images, captions, dim) and exp(2k) (images, num_regions, dim), for all pairs:
    (images, captions, num_regions, dim). That is 1 / (1 + exp(2q) exp(2k))."""
    return torch.addcmul(keys.new_ones(()), queries[:, :, None], keys[:, None], out=out).reciprocal_()


def slopes(distance: Tensor) -> Tensor:
    """d (1 - r) / dx = 2 r (1 - r) of r = `distances`, without the 2; in place of them."""
    return torch.addcmul(distance, distance, distance, value=-1, out=distance)


class _AdditiveScores(torch.autograd.Function):
    """-2 v · r with r = `distances`: v · tanh(q + k) but for the constant sum of v, which softmax does not see.

    Its backward pass reads r three times and writes nothing as large. Autograd's own would lay out the gradient of the
    sums, (images, captions, num_regions, attention_dim), three times.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, vector: Tensor) -> Tensor:
        """(images, captions, dim), (images, num_regions, dim), (dim,) → (images, captions, num_regions)."""
        distance = distances(queries, keys)
        ctx.save_for_backward(queries, keys, distance, vector)
        return (distance @ vector).mul_(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, distance, vector = ctx.saved_tensors
        for_vector = gradient.reshape(-1) @ distance.flatten(0, 2) * -2
        slope = slopes(distance.clone())
        for_queries, for_keys = (gradient[:, :, None] @ slope).squeeze(2), slope[:, 0] * gradient[:, 0, :, None]
        for caption in range(1, slope.shape[1]):
            for_keys.addcmul_(slope[:, caption], gradient[:, caption, :, None])
        # d r / dx = -2 r (1 - r) and d exp(2x) / dx = 2 exp(2x): of the exponentials it is this.
        return for_queries * vector * 2 / queries, for_keys * vector * 2 / keys, for_vector


class AdditiveAttention(Attention):
    """v · tanh(W_q q + W_k k): Bahdanau et al. 2015, appendix A.1.2; Luong et al. 2015, section 3.1, "concat"."""

    def __init__(self, hidden_dim: int, region_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_dim, attention_dim)
        self.key = nn.Linear(region_dim, attention_dim, bias=False)
        self.score = nn.Linear(attention_dim, 1, bias=False)

    def keys(self, regions: Tensor) -> Tensor:
        return exponential(self.key(regions))

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        compared = exponential(self.query(queries))
        with torch.autocast(keys.device.type, enabled=False):  # in the keys' precision
            scores: Tensor = _AdditiveScores.apply(compared, keys, self.score.weight[0].to(keys.dtype))
        return scores


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
