"""ROUGE-L, with the references prepared once for all captioners.

Lin: "ROUGE: A Package for Automatic Evaluation of Summaries" (ACL workshop Text Summarization Branches Out, 2004),
section 3.1 (the longest common subsequence of two sentences). As pycocoevalcap's `Rouge`, it takes the best precision
and the best recall of all references, and beta 1.2. The subsequence's length comes from one addition of whole numbers
a word: Hyyrö, "Bit-Parallel LCS-length Computation Revisited" (AWOCA 2004).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from captioning.errors import CapstanError

BETA = 1.2


class RougeL:
    """Scores many captioners' hypotheses against one set of references.

    Args:
        references: per image, its references: words with one space between.

    Raises:
        CapstanError: an image has no references.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        if not all(references):
            raise CapstanError("ROUGE_L needs at least one reference for each image")
        self._references = [[_Sentence(caption.split(" ")) for caption in captions] for captions in references]

    def score(self, hypotheses: Sequence[str]) -> NDArray[np.float64]:
        """Each image's score in [0, 1]; an empty caption's is 0. `hypotheses`: a caption an image, in their order."""
        pairs = zip(self._references, hypotheses, strict=True)
        return np.array([_score(references, caption) if caption else 0.0 for references, caption in pairs])


class _Sentence:
    def __init__(self, words: Sequence[str]) -> None:
        self.length = len(words)
        self.places: dict[str, int] = {}
        """Of each word, a number with a bit for each place where it stands."""
        for place, word in enumerate(words):
            self.places[word] = self.places.get(word, 0) | 1 << place

    def common_length(self, words: Sequence[str]) -> int:
        """The length of the longest common subsequence: the zeros that are left in `free`."""
        every = free = (1 << self.length) - 1
        for word in words:
            matches = free & self.places.get(word, 0)
            free = ((free + matches) | (free - matches)) & every
        return self.length - free.bit_count()


def _score(references: Sequence[_Sentence], caption: str) -> float:
    words = caption.split(" ")
    common = [reference.common_length(words) for reference in references]
    precision = max(common) / len(words)
    recall = max(length / reference.length for length, reference in zip(common, references, strict=True))
    if not precision:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
