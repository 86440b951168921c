"""Bootstrap intervals of means over images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

NUM_RESAMPLES = 1000
SEED = 15


class Interval(NamedTuple):
    """A mean with the ends of its 95 % interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def bootstrap_interval(sums: ArrayLike, counts: ArrayLike | None = None, level: float = 0.95) -> Interval:
    """The percentile bootstrap of a mean, resampling images (Efron & Tibshirani 1993, section 13.3).

    Images are the units because the words of one caption are not independent of each other. The draw is seeded, so
    the same values give the same interval.

    Args:
        sums: (num_images,) the sum of an image's values; the value itself where there is one per image.
        counts: (num_images,) how many values an image has; one each by default.

    Raises:
        ValueError: no values.
    """
    totals = np.asarray(sums, dtype=np.float64)
    sizes = np.ones_like(totals) if counts is None else np.asarray(counts, dtype=np.float64)
    totals, sizes = totals[sizes > 0], sizes[sizes > 0]
    if not len(totals):
        raise ValueError("an interval needs at least one value")
    generator = np.random.default_rng(SEED)
    means = np.empty(NUM_RESAMPLES)
    for index in range(NUM_RESAMPLES):  # one row at a time: memory stays flat for large test splits
        drawn = generator.integers(0, len(totals), len(totals))
        means[index] = totals[drawn].sum() / sizes[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(totals.sum() / sizes.sum()), float(low), float(high))
