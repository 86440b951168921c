"""Training a decoder: teacher forcing or, after it, self-critical; validation by loss and CIDEr-D after each epoch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from captioning import monitoring
from captioning.averaging import Average
from captioning.compiling import Compilation
from captioning.datasets import Batch, CaptionBatches, Share, epoch_order, largest, pieces
from captioning.decoders import Decoder
from captioning.distributed import ALONE, World
from captioning.errors import CapstanError
from captioning.evaluation import GreedyCider, Tally, foresee
from captioning.loop import Journal, Outcome
from captioning.memory import Fitting
from captioning.optimization import Named, Stepper, build_optimizer, seed_step
from captioning.penalties import loss_sum
from captioning.precision import autocast, choose_device, choose_precision
from captioning.scheduled_sampling import mix_in_own_words
from captioning.schedules import Course, learning_rate_factor, sampling_probability
from captioning.selection import Best, is_enough, score_of
from captioning.self_critical import Rewards, SelfCritical
from captioning.train_params import PlainTrainParams

ENCODER = "encoder."
"""Begins the names of an encoder's parameters in live mode."""

WORKS = {"train": "training", "loss": "validation", "search": "validation's captions"}
"""What memory may be too small for, as alerts say it."""


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seeds torch's global generator, which draws the first weights; same seed, same run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products on a GPU ask for
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    # No result depends on uninitialised memory; to fill it costs time at every allocation.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = not deterministic


class DecoderTask:
    """One decoder's training, as `captioning.loop` runs it. `history`: a record an epoch; `best`: the best weights."""

    name = "train"

    def __init__(
        self,
        decoder: Decoder,
        train: CaptionBatches,
        val: CaptionBatches,
        val_cider: GreedyCider,
        settings: PlainTrainParams,
        learning_rate: float,
        journal: Journal,
        world: World = ALONE,
        encoder_parts: Sequence[tuple[Named, float]] = (),
    ) -> None:
        """`encoder_parts`: in live mode, the encoder's named parameters that learn, with their learning rates."""
        self.device = choose_device()
        self.dtype = choose_precision(settings.precision, self.device)
        self.decoder = decoder.to(self.device)
        self.decoder.checkpointed = settings.gradient_checkpointing
        self.train, self.val, self.val_cider = train, val, val_cider
        self.settings, self.learning_rate, self.journal, self.world = settings, learning_rate, journal, world
        self.num_epochs, self.steps_per_epoch = settings.num_epochs, -(-len(train) // settings.accumulate_steps)
        own = [(name, p) for name, p in decoder.named_parameters() if not name.startswith(ENCODER)]
        self.tunes_encoder = bool(encoder_parts)
        optimizer = build_optimizer([(own, learning_rate), *encoder_parts], settings.optimizer)
        self.stepper = Stepper(optimizer, settings.clip_norm, self.dtype, world, settings.clip_value)
        self.average = Average(self.decoder, settings.ema_decay) if settings.ema_decay else None
        self.compilation = Compilation(self.decoder, self._example, world, settings.compile, settings.deterministic)
        self.best = Best()
        self.history: list[dict[str, Any]] = []
        self.tally: Tally | None = None
        """Of the step under way, where it will be logged."""
        sizes = {"train": settings.batch_size, "loss": val.size, "search": val_cider.size}
        self.fittings = {work: Fitting(size, self.device) for work, size in sizes.items()}
        """How many of a rank's images at once fit into memory: in a step, and in validation."""
        self.own_words = 0.0
        """How often the step under way reads a word of the decoder's own."""
        self.critic: SelfCritical | None = None
        if settings.self_critical is not None:
            self.critic = SelfCritical(train.captions, settings.self_critical, val_cider.vocabulary.max_length)
        self.rewards: Rewards | None = None
        """Of the step under way, where it is self-critical."""

    @property
    def judged(self) -> Decoder:
        """What is validated and kept: the average of the weights where there is one."""
        return self.decoder if self.average is None else self.average.model

    def batches(self, epoch: int, first: int) -> Iterator[list[Share]]:
        """Each step's batches: `accumulate_steps` of them, fewer at the epoch's end."""
        self.decoder.begin_epoch(epoch)
        order = epoch_order(len(self.train.captions), self.settings.seed, epoch)
        size, views = self.settings.accumulate_steps, self.train.draw_views(self.settings.seed, epoch)
        shares = self.train.epoch(order, first * size, self.world, views)
        while step := list(islice(shares, size)):
            yield step

    def train_step(self, shares: list[Share], step: int, stop: bool) -> Outcome:
        """The loss is the mean a token over all batches of the step, label smoothing included, whatever their number
        and the number of processes. After out-of-memory the step is done again in smaller pieces, and so is each one
        that follows."""
        self.compilation.prepare()
        self.decoder.train()
        epoch, self.rewards = step // self.steps_per_epoch, None
        self.own_words = sampling_probability(epoch, self.settings.scheduled_sampling)
        if self.critic is not None and self._is_self_critical(epoch):
            self.rewards = Rewards()
            _ = self.critic.rarity  # counted here, where out-of-memory is not the batch's
        num_tokens = sum(share.num_tokens for share in shares)
        fitting = self.fittings["train"]
        before = fitting.num_images
        mine = fitting.run(lambda parts: self.backward(shares, step, parts), largest(shares))
        short = fitting.num_images < before
        value, finite, stop = self.stepper.update(mine, self._rate_factor(step), stop, short)
        if self.stepper.was_short:
            self._agree("train", before)
        if finite and self.average is not None:
            self.average.update(step)
        if (step + 1) % self.settings.log_every_steps == 0:
            self._log(step + 1, value)
        num_images = sum(len(share.batch.features) for share in shares if share.batch is not None)
        monitoring.count(num_images * self.world.num_processes, num_tokens)
        return Outcome(value, num_tokens, finite, stop)

    def backward(self, shares: list[Share], step: int, parts: list[slice]) -> float:
        """This rank's gradients of a step, its batches taken in `parts` of their images: a pure function of the weights
        and these, however often it was begun before. Returns this rank's part of the loss."""
        seed_step(self.settings.seed, step, self.world.rank)
        is_critical, is_logged = self.rewards is not None, (step + 1) % self.settings.log_every_steps == 0
        self.rewards = Rewards() if is_critical else None
        self.tally = Tally() if is_logged and not is_critical else None
        num_tokens = sum(share.num_tokens for share in shares)
        cut = (replace(piece, num_tokens=num_tokens) for share in shares for piece in pieces(share, parts))
        return self.stepper.backward(loss for piece in cut for loss in self._losses(piece))

    def _agree(self, work: str, before: int) -> None:
        """All ranks go on with as many images at once as the one with the least memory."""
        fitting = self.fittings[work]
        fitting.num_images = min(map(int, self.world.gather(str(fitting.num_images).encode())))
        if fitting.num_images < before and self.world.is_main:
            monitoring.clear(f"out_of_memory_{work}")  # each halving is news
            said = f"out of memory in {WORKS[work]}: from here on at most {fitting.num_images} images at once"
            monitoring.alert(f"out_of_memory_{work}", said)

    def _is_self_critical(self, epoch: int) -> bool:
        """`epoch` counts from 0."""
        settings = self.settings.self_critical
        return settings is not None and epoch + 1 >= settings.start_epoch

    def _rate_factor(self, step: int) -> float:
        critical = self.settings.self_critical
        if critical is not None and self._is_self_critical(step // self.steps_per_epoch):
            return critical.rate_factor
        num_steps = self.settings.num_planned_epochs * self.steps_per_epoch
        return learning_rate_factor(step, self.settings.scheduler, Course(num_steps, self.steps_per_epoch, self.scores))

    @property
    def scores(self) -> list[float]:
        """Of each finished epoch, greater is better."""
        return [score_of(record, self.settings.select_by) for record in self.history]

    def _log(self, step: int, loss: float) -> None:
        found: dict[str, float] = {}
        if self.rewards is not None:
            found["reward"] = self.rewards.mean(self.world)
        elif self.tally is not None:
            tally = self.tally.over(self.world)
            found |= {"loss": loss, "perplexity": tally.perplexity, "accuracy": tally.accuracy}
        found["learning_rate"] = self.stepper.optimizer.param_groups[0]["lr"]
        found["gradient_norm"] = self.stepper.gradient_norm
        critical = self.settings.self_critical if self.rewards is not None else None
        if self.settings.scheduled_sampling is not None and (critical is None or critical.cross_entropy_weight):
            found["own_words"] = self.own_words
        if self.tunes_encoder:  # its parts come after the decoder's, and have one rate
            found["encoder_learning_rate"] = self.stepper.optimizer.param_groups[-1]["lr"]
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        strength = self.train.strength(epoch, place * self.settings.accumulate_steps)
        if strength is not None:
            found["augmentation_strength"] = strength
        self.journal(step, {f"train/{name}": value for name, value in found.items()})

    def _losses(self, share: Share) -> Iterator[Tensor]:
        """This rank's parts of a batch's loss, none where it has no images: `share.num_tokens` are the whole step's.
        One after the other, so that the graphs of two are not in memory at once."""
        if share.batch is None:
            return
        batch, weight = share.batch.to(self.device), 1.0
        if self.critic is not None and self.rewards is not None:
            with autocast(self.device, self.dtype):
                total = self.critic.loss_sum(self.decoder, batch, self.rewards)
            yield total / share.num_tokens
            weight = self.critic.settings.cross_entropy_weight
        if weight:
            with autocast(self.device, self.dtype):
                total = weight * self._cross_entropy(batch)
            yield total / share.num_tokens

    def _cross_entropy(self, batch: Batch) -> Tensor:
        """With the terms beside it, summed over the batch's tokens."""
        batch = mix_in_own_words(self.decoder, batch, self.own_words)
        smoothing, suppression = self.settings.label_smoothing, self.settings.eos_suppression
        return loss_sum(self.decoder, batch, smoothing, suppression, self.tally)

    def _example(self) -> Tensor | None:
        """The loss of this rank's part of the run's first batch, as much of it as a step takes at once, without
        augmentation and own words."""
        self.tally, self.own_words, self.rewards = None, 0.0, None
        order = epoch_order(len(self.train.captions), self.settings.seed, 0)
        share = next(self.train.epoch(order, world=self.world))
        return next(self._losses(pieces(share, [slice(0, self.fittings["train"].num_images)])[0]), None)

    def evaluate(self) -> tuple[Tally, float]:
        """Validation under teacher forcing, and CIDEr-D."""
        before = {work: self.fittings[work].num_images for work in ("loss", "search")}
        suppression = self.settings.eos_suppression
        tally = foresee(self.judged, self.val, self.device, self.world, self.fittings["loss"])
        least = suppression.min_length if suppression else 0
        cider = self.val_cider(self.judged, self.device, self.world, least, self.fittings["search"])
        for work, num_images in before.items():
            self._agree(work, num_images)
        return tally, cider

    def end_epoch(self, epoch: int, step: int, mean_loss: float, found: tuple[Tally, float]) -> str:
        tally, cider = found
        figures = {"loss": tally.loss, "perplexity": tally.perplexity, "accuracy": tally.accuracy, "CIDEr": cider}
        self.journal(step, {f"val/{name}": value for name, value in figures.items()})
        loss = "policy" if self._is_self_critical(epoch) else "train"
        record = {"epoch": epoch + 1, "step": step, f"{loss}_loss": mean_loss}
        self.history.append({**record, **{f"val_{name}": value for name, value in figures.items()}})
        self.best.offer(self.scores[-1], cider, epoch, self.judged.state_dict())
        self._stop_early()
        star = " (best)" if self.best.epoch == epoch else ""
        star += f"; no gain, so it ends {self.settings.num_epochs - len(self.history)} epochs early" * self.is_early
        return f"{loss} loss {mean_loss:.3f}, val loss {tally.loss:.3f}, val CIDEr {cider:.3f}{star}"

    def _stop_early(self) -> None:
        """The run ends with this epoch where validation has gained nothing for long enough; where self-critical epochs
        are planned, in these."""
        critical = self.settings.self_critical
        if is_enough(self.scores[critical.start_epoch - 1 if critical else 0 :], self.settings.early_stopping):
            self.num_epochs = len(self.history)

    @property
    def is_early(self) -> bool:
        return self.num_epochs < self.settings.num_epochs

    @property
    def resolved(self) -> dict[str, float]:
        """What `auto` in params.yaml may stand for."""
        return {
            "batch_size": self.settings.batch_size,
            "num_epochs": self.settings.num_epochs,
            "learning_rate": self.learning_rate,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "decoder": self.decoder.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {},
            "stepper": self.stepper.state_dict(),
            "best": self.best.state_dict(),
            "images_at_once": {work: fitting.num_images for work, fitting in self.fittings.items()},
            "compile_failed": self.compilation.failed,
            "history": self.history,
            "resolved": self.resolved,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CapstanError: the state is that of a run with other sizes."""
        if state["resolved"] != self.resolved:
            raise CapstanError(
                f"the checkpoint is of a run with {state['resolved']}, and auto now gives {self.resolved}: other "
                "hardware? To start over, remove the run's folder in .work/train."
            )
        self.decoder.load_state_dict(state["decoder"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.stepper.load_state_dict(state["stepper"])
        self.best = Best.from_state(state["best"])
        for work, num_images in state["images_at_once"].items():
            self.fittings[work].num_images = num_images
        self.compilation.resume(state["compile_failed"])
        self.history = state["history"]
        self._stop_early()
