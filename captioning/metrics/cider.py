"""CIDEr-D without Java, fast enough to run after every epoch: the references are counted once.

Vedantam, Zitnick, Parikh: "CIDEr: Consensus-based Image Description Evaluation" (CVPR 2015), section 3 (CIDEr) and
section 6 (the clipping and the length penalty of CIDEr-D). Equal to pycocoevalcap's `Cider` on the same tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from captioning.errors import CapstanError

NUM_ORDERS = 4
SIGMA = 6.0
"""Standard deviation, in words, of the penalty for a length unlike the reference's."""

Word = Hashable
"""A string, or the id of a token."""
NGram = tuple[Word, ...]


def count_ngrams(words: Sequence[Word]) -> Counter[NGram]:
    """Occurrences of all n-grams of 1 to NUM_ORDERS words."""
    # (words, words[1:], ...) end one after the other: zip stops at the last whole n-gram.
    shifted = [words[i:] for i in range(NUM_ORDERS)]
    return Counter(chain.from_iterable(zip(*shifted[:n], strict=False) for n in range(1, NUM_ORDERS + 1)))


def _length(words: Sequence[Word]) -> int:
    # pycocoevalcap measures length in bigrams; its scores depend on that for captions of 0 and 1 words.
    return max(0, len(words) - 1)


class Rarity:
    """How much an n-gram says: its inverse document frequency over images, where any of an image's references counts.

    Args:
        counts: per image, per reference, its n-grams.
    """

    def __init__(self, counts: Iterable[Sequence[Iterable[NGram]]]) -> None:
        frequency: Counter[NGram] = Counter()
        num_images = 0
        for captions in counts:
            frequency.update(set(chain.from_iterable(captions)))
            num_images += 1
        self.unseen = math.log(num_images)
        """Of an n-gram that no reference has."""
        # One image's n-gram is as rare as one that no image has: not to keep it saves most of the memory.
        self._known = {ngram: self.unseen - math.log(number) for ngram, number in frequency.items() if number > 1}

    def __getitem__(self, ngram: NGram) -> float:
        return self._known.get(ngram, self.unseen)


class Consensus:
    """One image's references, against which any number of captions are scored."""

    def __init__(
        self, references: Sequence[Sequence[Word]], rarity: Rarity, counts: Sequence[Counter[NGram]] | None = None
    ) -> None:
        """`counts`: the references' n-grams, where they are known already."""
        self._rarity = rarity
        self._lengths = np.array([_length(words) for words in references])
        self._postings: dict[NGram, list[tuple[int, float]]] = {}  # n-gram -> (reference, tf-idf)
        squares = np.zeros((len(references), NUM_ORDERS))
        for reference, found in enumerate(counts or [count_ngrams(words) for words in references]):
            for ngram, count in found.items():
                weight = count * rarity[ngram]
                self._postings.setdefault(ngram, []).append((reference, weight))
                squares[reference, len(ngram) - 1] += weight * weight
        self._norms = np.sqrt(squares)

    def score(self, words: Sequence[Word]) -> float:
        """Of one caption, in [0, 10]."""
        dot = np.zeros_like(self._norms)  # (num_references, NUM_ORDERS)
        squares = [0.0] * NUM_ORDERS
        for ngram, count in count_ngrams(words).items():
            weight = count * self._rarity[ngram]
            order = len(ngram) - 1
            squares[order] += weight * weight
            for reference, reference_weight in self._postings.get(ngram, ()):
                dot[reference, order] += min(weight, reference_weight) * reference_weight
        norms = self._norms * np.sqrt(squares)
        similarity = np.divide(dot, norms, out=np.zeros_like(dot), where=norms != 0)
        penalty = np.exp(-((_length(words) - self._lengths) ** 2) / (2 * SIGMA**2))
        return 10.0 * float((similarity.mean(axis=1) * penalty).mean())


class CiderD:
    """Scores many sets of hypotheses against one set of references (for each epoch of a training, say).

    Args:
        references: per image, per reference, its words. Document frequencies are counted over these images.

    Raises:
        CapstanError: there are no images, or an image has no references.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[Word]]]) -> None:
        if not references or not all(references):
            raise CapstanError("CIDEr needs at least one image, and at least one reference for each image")
        counts = [[count_ngrams(words) for words in captions] for captions in references]
        rarity = Rarity(counts)
        pairs = zip(references, counts, strict=True)
        self._images = [Consensus(captions, rarity, counted) for captions, counted in pairs]

    def score(self, hypotheses: Sequence[Sequence[Word]]) -> tuple[float, NDArray[np.float64]]:
        """The mean over images and each image's score, in [0, 10] as pycocoevalcap gives (COCO: about 1.2).

        Args:
            hypotheses: per image, in the references' order, the caption's words.

        Raises:
            CapstanError: another number of hypotheses than of images.
        """
        if len(hypotheses) != len(self._images):
            raise CapstanError(f"CIDEr got {len(hypotheses)} hypotheses for {len(self._images)} images")
        scores = np.array([image.score(words) for image, words in zip(self._images, hypotheses, strict=True)])
        return float(scores.mean()), scores
