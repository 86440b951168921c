"""The training loop: teacher forcing on cached features, validation by loss and free-running CIDEr-D each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from captioning.datasets import CaptionBatches, epoch_order
from captioning.decoders import Decoder
from captioning.errors import CapstanError
from captioning.evaluation import GreedyCider, evaluate_loss
from captioning.params import TrainParams
from captioning.precision import autocast, choose_device, choose_precision
from captioning.progress import Progress
from captioning.schedules import cosine_with_warmup

Log = Callable[[int, dict[str, float]], None]
"""Receives the optimizer step and metrics by name."""


def seed_everything(seed: int, deterministic: bool) -> torch.Generator:
    """Seeds torch's global generator and makes a further one for loaders; same seed, same run."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    # No result depends on uninitialised memory; to fill it costs time at every allocation.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = not deterministic
    return torch.Generator().manual_seed(seed)


def build_optimizer(decoder: Decoder, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only (biases and embeddings are left alone)."""
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in decoder.named_parameters():
        (decayed if parameter.ndim > 1 and "embedding" not in name else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


@dataclass
class Best:
    """The best epoch so far, by validation CIDEr-D; ties stay with the earlier one."""

    cider: float = -math.inf
    epoch: int = -1
    state: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, cider: float, epoch: int, decoder: Decoder) -> None:
        if cider > self.cider:
            state = {name: value.detach().cpu().clone() for name, value in decoder.state_dict().items()}
            self.cider, self.epoch, self.state = cider, epoch, state


class Trainer:
    """Trains one decoder. `run()` returns the best epoch's weights; `history` has a record an epoch."""

    def __init__(
        self,
        decoder: Decoder,
        train: CaptionBatches,
        val: CaptionBatches,
        val_cider: GreedyCider,
        settings: TrainParams,
        learning_rate: float,
        log: Log,
    ) -> None:
        self.device = choose_device()
        self.dtype = choose_precision(settings.precision, self.device)
        self.decoder = decoder.to(self.device)
        self.train, self.val, self.val_cider = train, val, val_cider
        self.settings, self.learning_rate, self.log = settings, learning_rate, log
        self.optimizer = build_optimizer(decoder, learning_rate, settings.weight_decay)
        self.num_steps = settings.num_epochs * len(train)
        self.step = 0
        self.best = Best()
        self.history: list[dict[str, Any]] = []

    def run(self) -> Best:
        """All epochs. Raises CapstanError where the loss is no longer finite."""
        with Progress("train", total=self.num_steps, unit="step") as progress:
            for epoch in range(self.settings.num_epochs):
                loss = self.train_one_epoch(epoch, progress)
                self._validate(epoch, loss, progress)
        return self.best

    def train_one_epoch(self, epoch: int, progress: Progress) -> float:
        """Returns the epoch's mean loss a token, label smoothing included."""
        self.decoder.train()
        total, num_tokens = 0.0, 0
        for batch in self.train.epoch(epoch_order(len(self.train.captions), self.settings.seed, epoch)):
            loss = self.train_step(batch.to(self.device))
            total, num_tokens = total + loss * batch.num_tokens, num_tokens + batch.num_tokens
            progress.update(note=f"loss {loss:.3f}")
            if self.step % self.settings.log_every_steps == 0:
                rate = self.optimizer.param_groups[0]["lr"]
                self.log(self.step, {"train/loss": loss, "train/learning_rate": rate})
        return total / num_tokens

    def train_step(self, batch: Any) -> float:
        """One optimizer step; returns the batch's mean loss a token."""
        settings = self.settings
        factor = cosine_with_warmup(self.step, settings.warmup_steps, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * factor
        with autocast(self.device, self.dtype):
            logits = self.decoder(batch)
        loss = functional.cross_entropy(
            logits.float(), batch.packed_targets, label_smoothing=settings.label_smoothing
        )  # Szegedy et al. 2016, section 7
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), settings.clip_norm)
        self.optimizer.step()
        self.step += 1
        value = loss.item()
        if not math.isfinite(value):
            raise CapstanError(f"the loss is {value} at step {self.step}: lower the learning rate or train.clip_norm")
        return value

    def _validate(self, epoch: int, train_loss: float, progress: Progress) -> None:
        val_loss = evaluate_loss(self.decoder, self.val, self.device)
        cider = self.val_cider(self.decoder, self.device)
        self.best.offer(cider, epoch, self.decoder)
        self.log(self.step, {"val/loss": val_loss, "val/CIDEr": cider})
        record = {
            "epoch": epoch + 1,
            "step": self.step,
            "train_loss": train_loss,
            "val_loss": val_loss,
            "val_CIDEr": cider,
        }
        self.history.append(record)
        star = " (best)" if self.best.epoch == epoch else ""
        progress.write(
            f"epoch {epoch + 1}/{self.settings.num_epochs}: train loss {train_loss:.3f}, "
            f"val loss {val_loss:.3f}, val CIDEr {cider:.3f}{star}"
        )
