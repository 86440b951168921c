"""What changes over a run by plan: the learning rate, and how often a model's own words are its input.

All of it is a pure function of the step, the run's plan and what validation found so far; a resumed run knows all
three, and goes on with the same rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captioning import train_params as settings_of


@dataclass(frozen=True)
class Course:
    """What a schedule may know of its run besides the step."""

    num_steps: int
    """Of the whole run as planned, whether or not it is stopped early."""
    steps_per_epoch: int
    scores: Sequence[float] = ()
    """What validation found after each finished epoch; greater is better."""


def cosine_with_warmup(step: int, warmup_steps: int, num_steps: int) -> float:
    """Linear from 0 to 1 over `warmup_steps`, then half a cosine down to 0 at `num_steps`. `step` counts from 0."""
    return _ramp(step, warmup_steps) * _fall(step, warmup_steps, num_steps, 0.0)


def learning_rate_factor(step: int, settings: settings_of.SchedulerSettings, course: Course) -> float:
    """The base rate's factor at a step, counted from 0: the scheduler's curve, behind linear warm-up."""
    return _ramp(step, settings.warmup_steps) * SCHEDULES[settings.name](step, settings, course)


def _ramp(step: int, warmup_steps: int) -> float:
    """1 from step `warmup_steps` on; the first step already moves."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def _half_cosine(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 (and before) to `end` at 1 (and after)."""
    return end + (start - end) * (0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress)))))


def _fall(step: int, warmup_steps: int, num_steps: int, end: float) -> float:
    """Loshchilov & Hutter 2017, equation 5, without restarts, from the end of warm-up to that of the run."""
    return _half_cosine(1.0, end, (step - warmup_steps) / max(1, num_steps - warmup_steps))


def _constant(step: int, settings: settings_of.ConstantScheduler, course: Course) -> float:
    return 1.0


def _cosine(step: int, settings: settings_of.CosineScheduler, course: Course) -> float:
    return _fall(step, settings.warmup_steps, course.num_steps, settings.min_factor)


def _step(step: int, settings: settings_of.StepScheduler, course: Course) -> float:
    num_falls = step // course.steps_per_epoch // settings.every_epochs
    return max(settings.min_factor, settings.factor**num_falls)


def _exponential(step: int, settings: settings_of.ExponentialScheduler, course: Course) -> float:
    epochs = max(0, step - settings.warmup_steps) / course.steps_per_epoch
    return max(settings.min_factor, settings.factor**epochs)


def _one_cycle(step: int, settings: settings_of.OneCycleScheduler, course: Course) -> float:
    """Smith & Topin 2018 with cosines for straight lines, as in torch: up to 1, then down to `min_factor` in the last
    step. (The momentum stays: that of Adam is not what they cycled.)"""
    done, num_steps = step - settings.warmup_steps, course.num_steps - settings.warmup_steps
    peak = settings.peak_at * num_steps - 1
    if done <= peak:
        return _half_cosine(settings.start_factor, 1.0, done / max(peak, 1e-9))
    return _half_cosine(1.0, settings.min_factor, (done - peak) / max(num_steps - 1 - peak, 1e-9))


def _inverse_square_root(step: int, settings: settings_of.InverseSquareRootScheduler, course: Course) -> float:
    """Vaswani et al. 2017, equation 3, with the highest rate for 1: the base rate is given instead of a model size."""
    return max(settings.min_factor, min(1.0, math.sqrt((settings.warmup_steps + 1) / (step + 1))))


def _plateau(step: int, settings: settings_of.PlateauScheduler, course: Course) -> float:
    """As torch's ReduceLROnPlateau counts, told over from the first epoch at every step."""
    factor, best, num_bad = 1.0, -math.inf, 0
    for score in course.scores:
        num_bad += 1
        if score > best + settings.min_delta:
            best, num_bad = score, 0
        if num_bad > settings.patience:
            factor, num_bad = factor * settings.factor, 0
    return max(settings.min_factor, factor)


SCHEDULES: dict[str, Callable[[int, Any, Course], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "step": _step,
    "exponential": _exponential,
    "one_cycle": _one_cycle,
    "inverse_square_root": _inverse_square_root,
    "plateau": _plateau,
}


def sampling_probability(epoch: int, settings: settings_of.ScheduledSampling | None) -> float:
    """How often a model's own word is its next input, in an epoch counted from 0 (Bengio et al. 2015, section 2.4, in
    steps): 0 before `start_epoch`, then `increase`, and as much again each `every_epochs`, up to `maximum`."""
    if settings is None or epoch + 1 < settings.start_epoch:
        return 0.0
    num_rises = 1 + (epoch + 1 - settings.start_epoch) // settings.every_epochs
    return min(settings.maximum, num_rises * settings.increase)
