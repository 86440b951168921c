"""Which epoch's weights are kept, and when a run has seen enough: functions of what validation found so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from captioning.train_params import EarlyStopping


def score_of(record: dict[str, Any], select_by: str) -> float:
    """An epoch's score by its record in the history, greater is better: validation CIDEr-D, or less the loss."""
    score = float(record["val_CIDEr"] if select_by == "CIDEr" else -record["val_loss"])
    return score if math.isfinite(score) else -math.inf


def is_enough(scores: Sequence[float], rule: EarlyStopping | None) -> bool:
    """Whether the last `patience` epochs gained nothing; the first epoch is a gain."""
    if rule is None:
        return False
    best, num_bad = -math.inf, 0
    for score in scores:
        num_bad += 1
        if score > best + rule.min_delta or best == -math.inf:
            best, num_bad = score, 0
    return num_bad >= rule.patience


@dataclass
class Best:
    """The best epoch so far; ties stay with the earlier one."""

    score: float = -math.inf
    cider: float = -math.inf
    """Validation CIDEr-D of that epoch, whatever it was chosen by."""
    epoch: int = -1
    state: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, score: float, cider: float, epoch: int, weights: dict[str, Tensor]) -> None:
        if score > self.score or self.epoch < 0:
            state = {name: value.detach().cpu().clone() for name, value in weights.items()}
            self.score, self.cider, self.epoch, self.state = score, cider, epoch, state

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "cider": self.cider, "epoch": self.epoch, "state": self.state}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Best:
        weights = {name: value.clone() for name, value in state["state"].items()}
        return cls(state["score"], state["cider"], state["epoch"], weights)
