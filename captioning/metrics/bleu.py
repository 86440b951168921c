"""BLEU, with the references counted once for all captioners.

Papineni, Roukos, Ward, Zhu: "BLEU: a Method for Automatic Evaluation of Machine Translation" (ACL 2002): section 2.1.1
(clipped counts), 2.2.2 (the closest reference length, the brevity penalty) and 2.3 (the geometric mean). Equal to
pycocoevalcap's `Bleu`, with the tiny numbers that it adds, so that an image's own score is never a division by zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from captioning.errors import CapstanError
from captioning.metrics.cider import NGram, count_ngrams

NUM_ORDERS = 4
TINY, SMALL = 1e-15, 1e-9


class Bleu:
    """Scores many captioners' hypotheses against one set of references.

    Args:
        references: per image, per reference, its words.

    Raises:
        CapstanError: an image has no references.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[str]]]) -> None:
        if not all(references):
            raise CapstanError("BLEU needs at least one reference for each image")
        self._lengths = [sorted({len(words) for words in captions}) for captions in references]
        self._limits = [_largest_counts(captions) for captions in references]

    def score(
        self, hypotheses: Sequence[Sequence[str]], groups: Sequence[Sequence[int]]
    ) -> tuple[list[list[float]], NDArray[np.float64]]:
        """Scores the words of one caption an image, in the references' order.

        Args:
            groups: sets of image indices.

        Returns:
            Each group's Bleu_1 to Bleu_4, from its summed counts and without smoothing; an empty group's are 0. And
            each image's own: (NUM_ORDERS, num_images).
        """
        rows = [self._count(*image) for image in enumerate(hypotheses)]
        counts = np.array(rows, dtype=np.int64).reshape(-1, 2 * NUM_ORDERS + 2)
        sums = [counts[list(group)].sum(axis=0) if len(group) else None for group in groups]
        of_groups = [[0.0] * NUM_ORDERS if total is None else _scores(total.tolist()) for total in sums]
        of_images = np.array([_scores(row) for row in rows], dtype=np.float64).reshape(-1, NUM_ORDERS)
        return of_groups, of_images.T

    def _count(self, image: int, words: Sequence[str]) -> list[int]:
        """Matching n-grams of each order, all n-grams of each order, words, and words of the closest reference."""
        limits, matching = self._limits[image], [0] * NUM_ORDERS
        for ngram, count in count_ngrams(words).items():
            matching[len(ngram) - 1] += min(count, limits.get(ngram, 0))
        all_ngrams = [max(0, len(words) - order) for order in range(NUM_ORDERS)]
        closest = min(self._lengths[image], key=lambda length: abs(length - len(words)))  # of two, the shorter
        return [*matching, *all_ngrams, len(words), closest]


def _largest_counts(captions: Sequence[Sequence[str]]) -> dict[NGram, int]:
    largest: Counter[NGram] = Counter()
    for words in captions:
        largest |= count_ngrams(words)
    return largest


def _scores(counts: Sequence[int]) -> list[float]:
    """Bleu_1 to Bleu_4 of what `_count` gives for an image, or of its sum over images."""
    matching, all_ngrams, (length, closest) = counts[:NUM_ORDERS], counts[NUM_ORDERS:-2], counts[-2:]
    ratio = (length + TINY) / (closest + SMALL)
    brevity_penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for order in range(NUM_ORDERS):
        product *= (matching[order] + TINY) / (all_ngrams[order] + SMALL)
        scores.append(product ** (1 / (order + 1)) * brevity_penalty)
    return scores
