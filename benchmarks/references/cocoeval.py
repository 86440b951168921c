"""Scoring as COCO's evaluation code does it: each captioner by itself, one step after the other.

COCOEvalCap's `evaluate` (pycocoevalcap), in our own words and with its own tokeniser and scorers: tokenise the
references, tokenise the captions, then BLEU, METEOR, ROUGE-L and CIDEr in turn. SPICE is left out: the CoreNLP models
that it needs come in no package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Scores = dict[str, tuple[float, list[float]]]
"""Of each metric the score of all images, and each image's."""


def evaluate(references: Sequence[Sequence[str]], captions: Sequence[str]) -> Scores:
    """Scores one captioner. Needs `java` on the PATH."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    words_of_references = tokenizer.tokenize({i: _entries(texts) for i, texts in enumerate(references)})
    words_of_captions = tokenizer.tokenize({i: _entries([text]) for i, text in enumerate(captions)})
    found: Scores = {}
    for scorer, names in ((Bleu(4), [f"Bleu_{n}" for n in range(1, 5)]), (Meteor(), ["METEOR"]),
                          (Rouge(), ["ROUGE_L"]), (Cider(), ["CIDEr"])):  # fmt: skip
        options: dict[str, Any] = {"verbose": 0} if len(names) > 1 else {}
        total, each = scorer.compute_score(words_of_references, words_of_captions, **options)
        totals, scores = (total, each) if len(names) > 1 else ([total], [each])
        found |= {n: (float(s), [float(x) for x in xs]) for n, s, xs in zip(names, totals, scores, strict=True)}
    return found


def _entries(captions: Sequence[str]) -> list[dict[str, str]]:
    return [{"caption": caption} for caption in captions]
