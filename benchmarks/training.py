"""P1: a training step beside the tutorials' and beside its matrix products: `python -m benchmarks.training`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Row, in_turn, ratio, show
from benchmarks.references.tutorial import tutorial_loss
from benchmarks.workload import ENCODER_DIM, NUM_REGIONS, VOCABULARY_SIZE, build, synthetic_batch
from captioning.datasets import Batch
from captioning.losses import cross_entropy


def product_shapes(decoder: Any, batch: Batch) -> list[tuple[int, int, int]]:
    """(rows, inner, columns) of the matrix products that one forward pass cannot do without."""
    running = sum(rows * columns for rows, columns in batch.extents)
    images, config = len(batch.features), decoder.config
    hidden, region, gates = config.hidden_dim, decoder.region_dim, 4 * config.hidden_dim
    return [
        (images * NUM_REGIONS, ENCODER_DIM, region),
        (images * NUM_REGIONS, region, config.attention_dim),
        (batch.num_tokens, config.embedding_dim, gates),
        *[(r * c, hidden, gates + config.attention_dim + region) for r, c in batch.extents],
        *[(r * c, region, gates) for r, c in batch.extents],
        (running, NUM_REGIONS, region),
        (batch.num_tokens, hidden + region, hidden),
        (batch.num_tokens, hidden, VOCABULARY_SIZE),
    ]


def measure_training() -> Row:
    """P1: a training step beside the tutorials' and beside its matrix products alone."""
    batch, decoder = synthetic_batch(16), build()
    operands = [(torch.randn(m, k), torch.randn(k, n), torch.randn(m, n)) for m, k, n in product_shapes(decoder, batch)]

    def step(loss: Any) -> Tensor:
        decoder.zero_grad()
        value = loss()
        value.backward()
        return value.detach()

    def ours() -> Tensor:
        return step(lambda: cross_entropy(decoder(batch), batch.packed_targets) / batch.num_tokens)

    def tutorial() -> Tensor:
        return step(lambda: tutorial_loss(decoder, batch))  # type: ignore[arg-type]

    def products() -> None:
        for left, right, gradient in operands:  # forward, and the two of backward
            _ = left @ right, gradient @ right.T, left.T @ gradient

    difference = abs(float(ours()) - float(tutorial()))
    times = in_turn({"ours": ours, "tutorial": tutorial, "products alone": products}, repeats=5)
    return {
        "work": "P1 training step, LSTM + Bahdanau, 16 × 5 captions, fp32",
        "times": times,
        "ratios": {
            "tutorial / ours": ratio(times, "tutorial", "ours"),
            "ours / products": ratio(times, "ours", "products alone"),
        },
        "check": {"difference of losses": difference},
    }


if __name__ == "__main__":
    show(measure_training())
