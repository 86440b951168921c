"""`train` in params.yaml. Which keys a scheduler or an optimizer has follows from its `name`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from captioning.param_types import Count, Fraction, Positive, PositiveOrAuto, Probability, Rate, Section

Shrink = Annotated[float, Field(gt=0, lt=1)]


class _Scheduler(Section):
    warmup_steps: Count
    """Optimizer steps in which the rate rises linearly from 0."""
    min_factor: Fraction
    """The rate never falls below this share of the base rate (after warm-up)."""


class ConstantScheduler(_Scheduler):
    name: Literal["constant"]


class CosineScheduler(_Scheduler):
    """Half a cosine down to `min_factor` at the run's end."""

    name: Literal["cosine"]


class StepScheduler(_Scheduler):
    name: Literal["step"]
    every_epochs: Positive
    factor: Shrink
    """Of the rate, after each `every_epochs` epochs."""


class ExponentialScheduler(_Scheduler):
    name: Literal["exponential"]
    factor: Shrink
    """Of the rate over an epoch; it falls a little at each step."""


class OneCycleScheduler(_Scheduler):
    name: Literal["one_cycle"]
    peak_at: Shrink
    """The share of the steps after warm-up at which the rate is highest."""
    start_factor: Annotated[float, Field(gt=0, le=1)]
    """Of the base rate, where the cycle begins; it ends at `min_factor`."""


class InverseSquareRootScheduler(_Scheduler):
    """Falls with the inverse square root of the step, from the base rate at the end of warm-up."""

    name: Literal["inverse_square_root"]


class PlateauScheduler(_Scheduler):
    """Falls when validation (by `select_by`) gains nothing."""

    name: Literal["plateau"]
    factor: Shrink
    patience: Count
    """Epochs without gain that are let pass; the one after them lowers the rate."""
    min_delta: Annotated[float, Field(ge=0)]
    """What counts as a gain: more than this above the best so far."""


SchedulerSettings = Annotated[
    ConstantScheduler
    | CosineScheduler
    | StepScheduler
    | ExponentialScheduler
    | OneCycleScheduler
    | InverseSquareRootScheduler
    | PlateauScheduler,
    Field(discriminator="name"),
]


class _Optimizer(Section):
    weight_decay: Annotated[float, Field(ge=0)]
    """Of matrices; biases, norms and embeddings are left alone. `adamw` and `adafactor` take it off the weights, the
    others add it to the gradient, as in torch."""


class AdamOptimizer(_Optimizer):
    name: Literal["adam", "adamw", "adamax", "nadam", "radam"]
    betas: tuple[Fraction, Fraction]


class SgdOptimizer(_Optimizer):
    name: Literal["sgd"]
    momentum: Fraction
    nesterov: bool

    @model_validator(mode="after")
    def _nesterov_looks_ahead(self) -> SgdOptimizer:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: true needs a momentum above 0")
        return self


class RmspropOptimizer(_Optimizer):
    name: Literal["rmsprop"]
    alpha: Fraction
    """How much of the mean square is kept from step to step."""
    momentum: Fraction


class AdadeltaOptimizer(_Optimizer):
    name: Literal["adadelta"]
    rho: Fraction
    """How much of the mean squares is kept from step to step."""


class PlainOptimizer(_Optimizer):
    name: Literal["adafactor", "adagrad", "asgd"]


OptimizerSettings = Annotated[
    AdamOptimizer | SgdOptimizer | RmspropOptimizer | AdadeltaOptimizer | PlainOptimizer, Field(discriminator="name")
]


ADAM_LIKE = ("adam", "adamw", "adamax", "nadam", "radam", "rmsprop")
"""Optimizers that divide by the gradient's size."""


def check_rate_known(decoder_type: str, optimizer: str) -> None:
    """Raises ValueError where `learning_rate: auto` knows no rate."""
    known = ADAM_LIKE if decoder_type == "transformer" else (*ADAM_LIKE, "sgd")
    if optimizer not in known:
        raise ValueError(
            f"learning_rate auto knows no rate for {optimizer} with a {decoder_type}, only for {', '.join(known)}: "
            "give a number, or range_test"
        )


class EarlyStopping(Section):
    patience: Positive
    """So many epochs in a row without gain end the run. Schedules still plan with `num_epochs`."""
    min_delta: Annotated[float, Field(ge=0)]
    """What counts as a gain: more than this above the best so far, by `select_by`."""


class ScheduledSampling(Section):
    """In training, a word that the model draws takes the place of the caption's, with a probability that grows."""

    start_epoch: Positive
    """The first one with sampling; epochs count from 1."""
    every_epochs: Positive
    increase: Annotated[float, Field(gt=0, le=1)]
    """The probability in `start_epoch`, and what it grows by each `every_epochs`."""
    maximum: Probability


class SelfCriticalTraining(Section):
    """CIDEr-D of captions that the model draws decides, after epochs of cross entropy (`captioning.self_critical`)."""

    start_epoch: Annotated[int, Field(ge=2)]
    """The first one with it; epochs count from 1. What comes before is trained as if it were the whole run: rates and
    augmentation are planned for it. Early stopping looks at the epochs from this one on."""
    num_samples: Annotated[int, Field(ge=2)]
    """Captions drawn for each image in a step."""
    rate_factor: Annotated[float, Field(gt=0, le=1)]
    """Of the base rates, from `start_epoch` on, in place of the scheduler's."""
    cross_entropy_weight: Annotated[float, Field(ge=0)]
    """Of cross entropy and the terms beside it, which stay in the loss (Paulus et al. 2017, section 3.3); 0: none."""


class EosSuppression(Section):
    """Against captions that end too early: a term of the loss, and no end before `min_length` in validation."""

    min_length: Positive
    """Tokens."""
    weight: Rate
    """Of the term beside the cross entropy."""


class AugmentationParams(Section):
    """Random changes to training images in live mode: each with its probability at full strength."""

    start_strength: Annotated[float, Field(gt=0, le=1)]
    """Of all changes in the first step; it grows exponentially to `end_strength` in the last."""
    end_strength: Annotated[float, Field(gt=0, le=1)]
    crop: Probability
    flip: Probability
    colour: Probability
    blur: Probability
    cutout: Probability


class TrainParams(Section):
    num_processes: Positive
    """More than one run under torchrun and share each batch. The order of samples does not depend on it, the last
    digits of a result do."""
    encoder_mode: Literal["cached", "live"]
    """`cached`: from the features stage's files. `live`: images from the shards, augmented and encoded at each step;
    the encoder can be fine-tuned (`encoder_settings.<name>.trainable`)."""
    augmentation: AugmentationParams | None
    gradient_checkpointing: bool
    """Compute again in the backward pass what would else be kept for it: an encoder's blocks (live mode), chunks of a
    recurrent decoder's steps, a Transformer's layers, and the logits. Less memory for more time; same results, to
    rounding."""
    compile: bool
    """Compile the encoder (live mode), a Transformer, or what a recurrent decoder does outside its loop, with
    torch.compile; where that fails, training says so and goes on without."""
    num_epochs: PositiveOrAuto
    """`auto`: by the number of steps in an epoch (`captioning.heuristics`)."""
    batch_size: PositiveOrAuto
    """Images per batch over all processes; each brings all its captions. `auto`: by the number of train images, and no
    more than a trial step shows to fit. Where a batch does not fit into memory, it is taken in parts."""
    accumulate_steps: Positive
    """Batches per optimizer step: they count as one large batch, and take one's memory."""
    optimizer: OptimizerSettings
    scheduler: SchedulerSettings
    label_smoothing: Fraction
    eos_suppression: EosSuppression | None
    scheduled_sampling: ScheduledSampling | None
    self_critical: SelfCriticalTraining | None
    clip_norm: Rate | None
    """Of all gradients together; null: off."""
    clip_value: Rate | None
    """Of each number in a gradient; null: off."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None
    """Of an exponential moving average of the weights, which then is what is validated and saved; null: off."""
    select_by: Literal["CIDEr", "loss"]
    """What validation must be best by: CIDEr-D of free-running greedy captions, or the loss under teacher forcing."""
    early_stopping: EarlyStopping | None
    log_every_steps: Positive
    max_skipped_steps: Count
    """A step whose loss or gradient is not finite is skipped; after so many in a row training stops."""
    precision: Literal["fp32", "bf16", "fp16", "auto"]
    seed: int
    deterministic: bool
    """Deterministic algorithms alone: the same bits in every run. Off, some are faster on a GPU."""

    @model_validator(mode="after")
    def _self_critical_begins(self) -> TrainParams:
        if self.self_critical is None:
            return self
        start = self.self_critical.start_epoch
        if self.select_by == "loss":
            raise ValueError("self_critical raises CIDEr and not the loss: set select_by to CIDEr")
        if self.num_epochs == "auto":
            raise ValueError("self_critical needs a number for num_epochs: auto plans cross entropy alone")
        if start > self.num_epochs:
            raise ValueError(f"self_critical.start_epoch {start} is after the last of {self.num_epochs} epochs")
        return self


class PlainTrainParams(TrainParams):
    """With numbers in place of `auto`: what a run is trained with."""

    num_epochs: Positive
    batch_size: Positive

    @property
    def num_planned_epochs(self) -> int:
        """That schedules plan with: those of cross entropy alone."""
        return self.num_epochs if self.self_critical is None else self.self_critical.start_epoch - 1
