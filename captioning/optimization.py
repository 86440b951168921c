"""One optimizer step, over one process or many: sum gradients, clip, and leave out what is not finite."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captioning.distributed import World


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds Python, NumPy and torch (CPU and GPU) for one step. So randomness is a pure function of these three, and a
    resumed run draws what an uninterrupted one would."""
    first, second = np.random.SeedSequence([seed, step, rank]).generate_state(2, np.uint64).tolist()
    random.seed(first)
    np.random.seed(second % 2**32)
    torch.manual_seed(first % 2**63)


Named = Sequence[tuple[str, Tensor]]


def build_adamw(
    parts: Sequence[tuple[Named, float]], weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW over parts of a model, each with its learning rate; weight decay on matrices only (biases, norms and
    embeddings are left alone)."""
    groups: list[dict[str, Any]] = []
    for named, learning_rate in parts:
        decayed = [tensor for name, tensor in named if tensor.ndim > 1 and "embedding" not in name]
        plain = [tensor for name, tensor in named if tensor.ndim <= 1 or "embedding" in name]
        groups.append({"params": decayed, "lr": learning_rate, "weight_decay": weight_decay})
        groups.append({"params": plain, "lr": learning_rate, "weight_decay": 0.0})
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=betas, fused=True)


class Stepper:
    """An optimizer with all that surrounds its step."""

    def __init__(self, optimizer: torch.optim.Optimizer, clip_norm: float, dtype: torch.dtype, world: World) -> None:
        self.optimizer, self.clip_norm, self.world = optimizer, clip_norm, world
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.learning_rates = [float(group["lr"]) for group in optimizer.param_groups]
        # fp16's range needs a scaled loss; bf16 and fp32 do not.
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=dtype == torch.float16)

    def step(self, loss: Tensor | None, factor: float, stop: bool = False) -> tuple[float, bool, bool]:
        """Backward, reduce, clip, update.

        Args:
            loss: this rank's part of the batch's loss, so that the sum over ranks is the loss; None: it has no part.
            factor: of the learning rate, by the schedule.
            stop: this rank was asked to end.

        Returns:
            The batch's loss; whether the update was made (False: loss or gradient is not finite, nothing changed);
            whether any rank was asked to end, which all ranks learn at the same step.
        """
        for group, rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
            # Frozen parameters keep their place, and nothing moves them, weight decay neither.
            group["lr"] = rate * factor if group["params"][0].requires_grad else 0.0
        self.optimizer.zero_grad(set_to_none=True)
        if loss is not None:
            self.scaler.scale(loss).backward()
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        value, stops = self.world.sum_flat(gradients, [0.0 if loss is None else loss.item(), float(stop)])
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        finite = math.isfinite(value) and math.isfinite(norm.item())
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()  # lowers the scale where `unscale_` met an infinity
        return value, finite, stops > 0

    def state_dict(self) -> dict[str, Any]:
        """Plain: a list of each parameter's state, in order, and the scaler's."""
        state = self.optimizer.state_dict()["state"]
        return {
            "parameters": [state.get(i, {}) for i in range(len(self.parameters))],
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        full = self.optimizer.state_dict()
        full["state"] = {i: values for i, values in enumerate(state["parameters"]) if values}
        self.optimizer.load_state_dict(full)
        self.scaler.load_state_dict(state["scaler"])
