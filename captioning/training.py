"""Training a decoder: teacher forcing on cached features, validation by loss and free-running CIDEr-D each epoch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from captioning import monitoring
from captioning.datasets import CaptionBatches, Share, epoch_order
from captioning.decoders import Decoder
from captioning.distributed import ALONE, World
from captioning.evaluation import GreedyCider, evaluate_loss
from captioning.loop import Journal, Outcome
from captioning.losses import cross_entropy
from captioning.optimization import Named, Stepper, build_adamw, seed_step
from captioning.params import TrainParams
from captioning.precision import autocast, choose_device, choose_precision
from captioning.schedules import cosine_with_warmup

BETAS = (0.9, 0.999)
ENCODER = "encoder."
"""Begins the names of an encoder's parameters in live mode."""


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seeds torch's global generator, which draws the first weights; same seed, same run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products on a GPU ask for
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    # No result depends on uninitialised memory; to fill it costs time at every allocation.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = not deterministic


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


class DecoderTask:
    """One decoder's training, as `captioning.loop` runs it. `history`: a record an epoch; `best`: the best weights."""

    name = "train"

    def __init__(
        self,
        decoder: Decoder,
        train: CaptionBatches,
        val: CaptionBatches,
        val_cider: GreedyCider,
        settings: TrainParams,
        learning_rate: float,
        journal: Journal,
        world: World = ALONE,
        encoder_parts: Sequence[tuple[Named, float]] = (),
    ) -> None:
        """`encoder_parts`: in live mode, the encoder's named parameters that learn, with their learning rates."""
        self.device = choose_device()
        self.dtype = choose_precision(settings.precision, self.device)
        self.decoder = decoder.to(self.device)
        self.train, self.val, self.val_cider = train, val, val_cider
        self.settings, self.journal, self.world = settings, journal, world
        self.num_epochs, self.steps_per_epoch = settings.num_epochs, len(train)
        own = [(name, p) for name, p in decoder.named_parameters() if not name.startswith(ENCODER)]
        optimizer = build_adamw([(own, learning_rate), *encoder_parts], settings.weight_decay, BETAS)
        self.stepper = Stepper(optimizer, settings.clip_norm, self.dtype, world)
        self.best = Best()
        self.history: list[dict[str, Any]] = []

    def batches(self, epoch: int, first: int) -> Iterator[Share]:
        self.decoder.begin_epoch(epoch)
        order = epoch_order(len(self.train.captions), self.settings.seed, epoch)
        return self.train.epoch(order, first, self.world, self.train.draw_views(self.settings.seed, epoch))

    def train_step(self, share: Share, step: int, stop: bool) -> Outcome:
        """The loss is the whole batch's mean a token, label smoothing included, whatever the number of processes."""
        self.decoder.train()
        seed_step(self.settings.seed, step, self.world.rank)
        num_steps = self.num_epochs * self.steps_per_epoch
        factor = cosine_with_warmup(step, self.settings.warmup_steps, num_steps)
        value, finite, stop = self.stepper.step(self._loss(share), factor, stop)
        if (step + 1) % self.settings.log_every_steps == 0:
            rate = self.stepper.optimizer.param_groups[0]["lr"]
            self.journal(step + 1, {"train/loss": value, "train/learning_rate": rate})
        if share.batch is not None:
            monitoring.count(len(share.batch.features) * self.world.num_processes, share.num_tokens)
        return Outcome(value, share.num_tokens, finite, stop)

    def _loss(self, share: Share) -> Tensor | None:
        if share.batch is None:
            return None
        batch = share.batch.to(self.device)
        with autocast(self.device, self.dtype):
            logits = self.decoder(batch)
        total = cross_entropy(logits.float(), batch.packed_targets, self.settings.label_smoothing)
        return total / share.num_tokens

    def evaluate(self) -> tuple[float, float]:
        """Validation loss and CIDEr-D."""
        loss = evaluate_loss(self.decoder, self.val, self.device, self.world)
        return loss, self.val_cider(self.decoder, self.device, self.world)

    def end_epoch(self, epoch: int, step: int, mean_loss: float, found: tuple[float, float]) -> str:
        val_loss, cider = found
        self.best.offer(cider, epoch, self.decoder)
        self.journal(step, {"val/loss": val_loss, "val/CIDEr": cider})
        record = {"epoch": epoch + 1, "step": step, "train_loss": mean_loss, "val_loss": val_loss, "val_CIDEr": cider}
        self.history.append(record)
        star = " (best)" if self.best.epoch == epoch else ""
        return f"train loss {mean_loss:.3f}, val loss {val_loss:.3f}, val CIDEr {cider:.3f}{star}"

    def state_dict(self) -> dict[str, Any]:
        best = {"cider": self.best.cider, "epoch": self.best.epoch, "state": self.best.state}
        parts = {"decoder": self.decoder.state_dict(), "stepper": self.stepper.state_dict()}
        return {**parts, "best": best, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decoder.load_state_dict(state["decoder"])
        self.stepper.load_state_dict(state["stepper"])
        best = state["best"]
        self.best = Best(best["cider"], best["epoch"], {name: value.clone() for name, value in best["state"].items()})
        self.history = state["history"]
