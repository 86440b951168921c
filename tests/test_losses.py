"""Cross entropy: torch's value, and torch's gradient."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from captioning.losses import cross_entropy


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 7), st.integers(2, 9), st.sampled_from([0.0, 0.1, 0.6]), st.integers(0, 99))
def test_value_and_gradient_are_torch_s(num_tokens: int, num_words: int, smoothing: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_words, generator=draw, dtype=torch.float64).mul_(5).requires_grad_()
    targets = torch.randint(num_words, (num_tokens,), generator=draw)
    plain = functional.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
    ours = cross_entropy(logits, targets, smoothing)
    gradients = [torch.autograd.grad(3 * loss, logits)[0] for loss in (plain, ours)]
    assert torch.allclose(ours, plain, rtol=1e-12)
    assert torch.allclose(*gradients, rtol=1e-12, atol=1e-14)


def test_it_is_not_finite_where_the_logits_are_not() -> None:
    assert not cross_entropy(torch.tensor([[0.0, float("nan")]]), torch.tensor([0])).isfinite()
