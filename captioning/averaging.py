"""An exponential moving average of a model's weights (Polyak & Juditsky 1992, with forgetting)."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class Average(Generic[Model]):
    """A second model, whose weights are the average: to be validated and saved instead of the first."""

    def __init__(self, model: Model, decay: float) -> None:
        """`decay`: what the average keeps of itself in a step, once the run is old enough; see `update`."""
        self.source, self.decay = model, decay
        self.model: Model = copy.deepcopy(model)
        self.model.requires_grad_(False)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes up the weights after optimizer step `step`, counted from 0.

        Early on the decay is (1 + step) / (10 + step), as in TensorFlow's average: the first, random weights are
        forgotten at once. Buffers are copied.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        for mine, new in zip(self.model.parameters(), self.source.parameters(), strict=True):
            mine.lerp_(new, 1 - decay)
        for kept, buffer in zip(self.model.buffers(), self.source.buffers(), strict=True):
            kept.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)
