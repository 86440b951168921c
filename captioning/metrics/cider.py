"""CIDEr-D without Java, fast enough to run after every epoch: the references are counted once.

Vedantam, Zitnick, Parikh: "CIDEr: Consensus-based Image Description Evaluation" (CVPR 2015), section 3 (CIDEr) and
section 6 (the clipping and the length penalty of CIDEr-D). Equal to pycocoevalcap's `Cider` on the same tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from captioning.errors import CapstanError

NUM_ORDERS = 4
SIGMA = 6.0
"""Standard deviation, in words, of the penalty for a length unlike the reference's."""

NGram = tuple[str, ...]


def count_ngrams(words: Sequence[str]) -> Counter[NGram]:
    """Occurrences of all n-grams of 1 to NUM_ORDERS words."""
    # (words, words[1:], ...) end one after the other: zip stops at the last whole n-gram.
    shifted = [words[i:] for i in range(NUM_ORDERS)]
    return Counter(chain.from_iterable(zip(*shifted[:n], strict=False) for n in range(1, NUM_ORDERS + 1)))


def _length(words: Sequence[str]) -> int:
    # pycocoevalcap measures length in bigrams; its scores depend on that for captions of 0 and 1 words.
    return max(0, len(words) - 1)


class CiderD:
    """Scores many sets of hypotheses against one set of references (for each epoch of a training, say).

    Args:
        references: per image, per reference, its words. Document frequencies are counted over these images.

    Raises:
        CapstanError: there are no images, or an image has no references.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[str]]]) -> None:
        if not references or not all(references):
            raise CapstanError("CIDEr needs at least one image, and at least one reference for each image")
        counts = [[count_ngrams(words) for words in captions] for captions in references]
        frequency = Counter(chain.from_iterable(set(chain.from_iterable(captions)) for captions in counts))
        log_num_images = math.log(len(references))
        self._unseen = log_num_images
        self._rarity = {ngram: log_num_images - math.log(number) for ngram, number in frequency.items()}
        self._lengths = [np.array([_length(words) for words in captions]) for captions in references]
        self._norms: list[NDArray[np.float64]] = []  # per image: (num_references, NUM_ORDERS)
        self._postings: list[dict[NGram, list[tuple[int, float]]]] = []  # per image: n-gram -> (reference, tf-idf)
        for captions in counts:
            self._add_image(captions)

    def _add_image(self, captions: Sequence[Counter[NGram]]) -> None:
        postings: dict[NGram, list[tuple[int, float]]] = {}
        norms = np.zeros((len(captions), NUM_ORDERS))
        for reference, counts in enumerate(captions):
            for ngram, count in counts.items():
                weight = count * self._rarity[ngram]
                postings.setdefault(ngram, []).append((reference, weight))
                norms[reference, len(ngram) - 1] += weight * weight
        self._norms.append(np.sqrt(norms))
        self._postings.append(postings)

    def score(self, hypotheses: Sequence[Sequence[str]]) -> tuple[float, NDArray[np.float64]]:
        """The mean over images and each image's score, in [0, 10] as pycocoevalcap gives (COCO: about 1.2).

        Args:
            hypotheses: per image, in the references' order, the caption's words.

        Raises:
            CapstanError: another number of hypotheses than of images.
        """
        if len(hypotheses) != len(self._postings):
            raise CapstanError(f"CIDEr got {len(hypotheses)} hypotheses for {len(self._postings)} images")
        scores = np.array([self._score_image(image, words) for image, words in enumerate(hypotheses)])
        return float(scores.mean()), scores

    def _score_image(self, image: int, words: Sequence[str]) -> float:
        dot = np.zeros_like(self._norms[image])  # (num_references, NUM_ORDERS)
        squares = [0.0] * NUM_ORDERS
        for ngram, count in count_ngrams(words).items():
            weight = count * self._rarity.get(ngram, self._unseen)
            order = len(ngram) - 1
            squares[order] += weight * weight
            for reference, reference_weight in self._postings[image].get(ngram, ()):
                dot[reference, order] += min(weight, reference_weight) * reference_weight
        norms = self._norms[image] * np.sqrt(squares)
        similarity = np.divide(dot, norms, out=np.zeros_like(dot), where=norms != 0)
        penalty = np.exp(-((_length(words) - self._lengths[image]) ** 2) / (2 * SIGMA**2))
        return 10.0 * float((similarity.mean(axis=1) * penalty).mean())
