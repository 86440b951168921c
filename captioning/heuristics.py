"""What `auto` becomes where no trial is needed: formulas of a data set's size and a model's width.

Pure functions, each with its source or what it was fitted to. docs/training.md explains them to users.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from captioning.train_params import ADAM_LIKE, check_rate_known

if TYPE_CHECKING:
    from captioning.param_types import Auto

CAPTIONS_PER_OCCURRENCE = 6000
MAX_FREQUENCY = 5
"""Karpathy & Fei-Fei 2015, section 4, on Flickr8k (30 000 captions), Flickr30k and COCO."""

STEPS = 1000
MIN_EPOCHS, MAX_EPOCHS = 10, 30

REFERENCE_BATCH = 32
"""Images a step, for which the rates below hold."""
ADAM_RATES = {"lstm": (1e-3, 384), "gru": (1e-3, 384), "transformer": (1e-3, 256)}
"""Learning rate, and the `hidden_dim` it was found for."""
SGD_RATE = 1.0
"""Of recurrent decoders, without momentum. (im2txt, the code of Vinyals et al. 2016, begins at 2.0.)"""


def resolve_min_frequency(setting: int | Auto, num_captions: int) -> int:
    """`auto`: one occurrence for every 6000 captions of the train split, rounded up; 5 at most."""
    if setting != "auto":
        return setting
    return max(1, min(MAX_FREQUENCY, math.ceil(num_captions / CAPTIONS_PER_OCCURRENCE)))


def choose_batch_size(num_images: int, num_that_fit: int) -> int:
    """The largest power of two that is no more than the square root of the train images, so that an epoch has at least
    as many steps as a step has images, and no more than what fits into memory."""
    most = max(1, min(math.isqrt(num_images), num_that_fit))
    return 1 << (most.bit_length() - 1)


def choose_num_epochs(steps_per_epoch: int) -> int:
    """As many epochs as come nearest to 1000 optimizer steps, but 10 at least and 30 at most."""
    return max(MIN_EPOCHS, min(MAX_EPOCHS, round(STEPS / steps_per_epoch)))


def choose_rate(
    decoder_type: str, hidden_dim: int, optimizer: str, images_per_step: int, momentum: float = 0.0
) -> float:
    """A reference rate, scaled with the batch and, for Adam and its relatives, the width; two significant digits.

    Adam's rate goes with the inverse of the width, SGD's is the same for all (Yang et al. 2021, "Tensor Programs V",
    table 3, for matrices of hidden layers). Momentum m makes a gradient count 1 / (1 - m) times.

    Raises:
        ValueError: no rate is known for this optimizer and type.
    """
    check_rate_known(decoder_type, optimizer)
    factor = images_per_step / REFERENCE_BATCH
    if optimizer == "sgd":
        rate = scale_rate(SGD_RATE * (1 - momentum), optimizer, factor)
    else:
        rate, width = ADAM_RATES[decoder_type]
        rate = scale_rate(rate * width / hidden_dim, optimizer, factor)
    return float(f"{rate:.2g}")


def scale_rate(rate: float, optimizer: str, factor: float) -> float:
    """A rate for a batch `factor` times as large.

    For Adam and its relatives with the square root (Krizhevsky 2014, "One weird trick", section 5; Malladi et al. 2022,
    "On the SDEs and scaling rules for adaptive gradient algorithms", for Adam and RMSprop), for SGD in proportion
    (Goyal et al. 2017, "Accurate, large minibatch SGD", section 2.1).
    """
    return rate * (math.sqrt(factor) if optimizer in ADAM_LIKE else factor)


SMOOTHING = 0.9
"""How much of the mean loss is kept from step to step of a range test."""
BELOW_MINIMUM = 10.0
MIN_POINTS = 8


def smooth(values: Sequence[float]) -> list[float]:
    """An exponential moving average, each value divided by the weights so far (Kingma & Ba 2015, section 3)."""
    mean, found = 0.0, []
    for number, value in enumerate(values, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        found.append(mean / (1 - SMOOTHING**number))
    return found


def choose_rate_by_test(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate of a learning rate range test (Smith 2017, "Cyclical learning rates", section 3.3): where the smoothed
    loss falls steepest against the logarithm of the rate, and at most a tenth of the rate at its minimum, where the
    next one may already be too much. Two significant digits.

    Args:
        rates: rising by the same factor from step to step.
        losses: of these steps, as they were.

    Raises:
        ValueError: the loss never fell.
    """
    curve = smooth(losses)
    lowest = min(range(len(curve)), key=curve.__getitem__) if curve else 0
    if lowest < MIN_POINTS:
        raise ValueError(f"the loss rose from the first rates on (after {lowest} steps)")
    slopes = [curve[i + 1] - curve[i - 1] for i in range(1, lowest)]
    steepest = 1 + min(range(len(slopes)), key=slopes.__getitem__)
    return float(f"{min(rates[steepest], rates[lowest] / BELOW_MINIMUM):.2g}")
