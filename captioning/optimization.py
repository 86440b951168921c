"""One optimizer step, over one process or many: sum gradients, clip, and leave out what is not finite."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from captioning.distributed import World

if TYPE_CHECKING:
    from captioning.train_params import OptimizerSettings


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds Python, NumPy and torch (CPU and GPU) for one step. So randomness is a pure function of these three, and a
    resumed run draws what an uninterrupted one would."""
    first, second = np.random.SeedSequence([seed, step, rank]).generate_state(2, np.uint64).tolist()
    random.seed(first)
    np.random.seed(second % 2**32)
    torch.manual_seed(first % 2**63)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "adam": partial(torch.optim.Adam, fused=True),
    "adamax": torch.optim.Adamax,
    "adamw": partial(torch.optim.AdamW, fused=True),
    "asgd": torch.optim.ASGD,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
"""torch's, but for those that ask for more than a gradient a step (LBFGS, Rprop, SparseAdam) or train matrices alone
(Muon)."""

Named = Sequence[tuple[str, Tensor]]
Groups = Sequence[tuple[Named, float]]
"""Named parameters, and their base learning rate."""


def build_optimizer(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer that params.yaml names; weight decay on matrices only (biases, norms and embeddings are left
    alone)."""
    options = settings.model_dump(exclude={"name", "weight_decay"})
    return OPTIMIZERS[settings.name](_split(groups, settings.weight_decay), **options)


def build_adamw(groups: Groups, weight_decay: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """As `build_optimizer` builds AdamW."""
    return OPTIMIZERS["adamw"](_split(groups, weight_decay), betas=betas)


def _split(groups: Groups, weight_decay: float) -> list[dict[str, Any]]:
    """torch's parameter groups: of each group one with decay and one without."""
    parts: list[dict[str, Any]] = []
    for named, rate in groups:
        decayed = [tensor for name, tensor in named if tensor.ndim > 1 and "embedding" not in name]
        plain = [tensor for name, tensor in named if tensor.ndim <= 1 or "embedding" in name]
        parts += [{"params": found, "weight_decay": decay, "lr": rate}
                  for found, decay in ((decayed, weight_decay), (plain, 0.0)) if found]  # fmt: skip
    return parts


class Stepper:
    """An optimizer with all that surrounds its step."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        clip_norm: float | None,
        dtype: torch.dtype,
        world: World,
        clip_value: float | None = None,
    ) -> None:
        """`clip_norm`: of all gradients together; `clip_value`: of each number in them, after that. None: off."""
        self.optimizer, self.clip_norm, self.clip_value, self.world = optimizer, clip_norm, clip_value, world
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.learning_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.gradient_norm = math.nan
        """Of the last step, before clipping."""
        self.was_short = False
        """Whether some rank's memory was too small for its part of the last step in one piece: see `update`."""
        # fp16's range needs a scaled loss; bf16 and fp32 do not.
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=dtype == torch.float16)

    def step(self, loss: Tensor | None, factor: float, stop: bool = False) -> tuple[float, bool, bool]:
        """`step_over` a batch in one piece."""
        return self.step_over([loss], factor, stop)

    def step_over(self, losses: Iterable[Tensor | None], factor: float, stop: bool = False) -> tuple[float, bool, bool]:
        """`backward`, then `update`."""
        return self.update(self.backward(losses), factor, stop)

    def backward(self, losses: Iterable[Tensor | None]) -> float:
        """This rank's gradients, from zero, of a batch's loss. It waits for no other rank, so that it may be repeated
        where it fails.

        Args:
            losses: of the batch's pieces, taken one after the other: a piece's graph is gone before the next is
                computed. Each is this rank's part, so that the sum over pieces and ranks is the batch's loss; None: it
                has no part.

        Returns:
            This rank's part of the loss.
        """
        self.optimizer.zero_grad(set_to_none=True)
        return self._backward(losses)

    def update(self, mine: float, factor: float, stop: bool = False, short: bool = False) -> tuple[float, bool, bool]:
        """Reduce, clip, update.

        Args:
            mine: what `backward` returned.
            factor: of the learning rates, by the schedule.
            stop: this rank was asked to end.
            short: this rank's memory was too small for its part in one piece; then `was_short` on all ranks.

        Returns:
            The batch's loss; whether the update was made (False: loss or gradient is not finite, nothing changed);
            whether any rank was asked to end, which all ranks learn at the same step.
        """
        for group, rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = rate * factor
        value, stops, shorts = self.world.sum_flat(self._gradients(), [mine, float(stop), float(short)])
        self.was_short = shorts > 0
        self.scaler.unscale_(self.optimizer)
        self.gradient_norm = self._clip()
        finite = math.isfinite(value) and math.isfinite(self.gradient_norm)
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()  # lowers the scale where `unscale_` met an infinity
        return value, finite, stops > 0

    def _backward(self, losses: Iterable[Tensor | None]) -> float:
        found = []
        for loss in losses:
            if loss is not None:
                self.scaler.scale(loss).backward()
                found.append(loss.detach())
            del loss  # its graph goes before the next piece's is made
        return sum((loss.item() for loss in found), 0.0)  # asked for last, so that a GPU is waited for once

    def _gradients(self) -> list[Tensor]:
        """Of what is trained at this step: the same on every rank, also on one that has no part of the batch."""
        trained = [p for p in self.parameters if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in trained if p.grad is not None]

    def _clip(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm or math.inf)
        if self.clip_value is not None:
            torch.nn.utils.clip_grad_value_(self.parameters, self.clip_value)
        return norm.item()

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
