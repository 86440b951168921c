"""The metrics by name, over PTB tokens, as pycocoevalcap computes them: for groups of images and for each image.

BLEU and METEOR of a group come from its summed counts; ROUGE_L, CIDEr and SPICE are means over its images. CIDEr's
document frequencies are counted over the group's own images, so a source's CIDEr does not depend on which sources stand
beside it; an image's own CIDEr is that within all the images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from captioning import storage
from captioning.errors import unknown_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLEU_ORDERS = 4
BLEU = "Bleu"
"""The part of all orders, which one computation gives."""


@dataclass(frozen=True)
class Tokenized:
    """Captions as PTB words joined by one space; `groups` are sets of image indices, the scores' units."""

    references: list[list[str]]
    hypotheses: list[str]
    groups: list[list[int]]

    def group_references(self, group: list[int]) -> dict[int, list[str]]:
        return {i: self.references[i] for i in group}

    def group_hypotheses(self, group: list[int]) -> dict[int, list[str]]:
        return {i: [self.hypotheses[i]] for i in group}


@dataclass(frozen=True)
class MetricScores:
    """One metric: a score for each group, and one for each image: (num_images,) float64."""

    groups: list[float]
    images: NDArray[np.float64]


Scorer = Callable[[Tokenized], dict[str, MetricScores]]
Builder = Callable[["Path | None", ExitStack], Scorer]


def _everything(tokenized: Tokenized) -> list[int]:
    return list(range(len(tokenized.hypotheses)))


def _means(images: NDArray[np.float64], groups: list[list[int]]) -> list[float]:
    return [float(images[group].mean()) if group else 0.0 for group in groups]


def score_bleu(tokenized: Tokenized) -> dict[str, MetricScores]:
    """BLEU (Papineni et al., ACL 2002), the closest reference length, not smoothed over a group."""
    import numpy as np
    from pycocoevalcap.bleu.bleu import Bleu

    def compute(group: list[int]) -> tuple[list[float], list[list[float]]]:
        if not group:
            return [0.0] * BLEU_ORDERS, [[]] * BLEU_ORDERS
        references, hypotheses = tokenized.group_references(group), tokenized.group_hypotheses(group)
        return Bleu(BLEU_ORDERS).compute_score(references, hypotheses, verbose=0)

    groups = [compute(group)[0] for group in tokenized.groups]
    images = np.array(compute(_everything(tokenized))[1], dtype=np.float64)  # (BLEU_ORDERS, num_images)
    images[:, [not hypothesis for hypothesis in tokenized.hypotheses]] = 0.0
    return {f"Bleu_{n + 1}": MetricScores([float(group[n]) for group in groups], images[n]) for n in range(BLEU_ORDERS)}


def score_rouge(tokenized: Tokenized) -> dict[str, MetricScores]:
    """ROUGE-L (Lin, 2004), beta 1.2."""
    import numpy as np
    from pycocoevalcap.rouge.rouge import Rouge

    rouge = Rouge()
    # pycocoevalcap gives an empty caption 1 where a reference is empty too.
    values = [
        rouge.calc_score([hypothesis], references) if hypothesis else 0.0
        for references, hypothesis in zip(tokenized.references, tokenized.hypotheses, strict=True)
    ]
    images = np.array(values, dtype=np.float64)
    return {"ROUGE_L": MetricScores(_means(images, tokenized.groups), images)}


def score_cider(tokenized: Tokenized) -> dict[str, MetricScores]:
    """CIDEr-D (`captioning.metrics.cider`), equal to pycocoevalcap's to 1e-9."""
    from captioning.metrics.cider import CiderD

    def compute(group: list[int]) -> tuple[float, NDArray[np.float64]]:
        references = [[caption.split() for caption in tokenized.references[i]] for i in group]
        return CiderD(references).score([tokenized.hypotheses[i].split() for i in group])

    groups = [compute(group)[0] if group else 0.0 for group in tokenized.groups]
    return {"CIDEr": MetricScores(groups, compute(_everything(tokenized))[1])}


def build_bleu(spice_root: Path | None, stack: ExitStack) -> Scorer:
    return score_bleu


def build_rouge(spice_root: Path | None, stack: ExitStack) -> Scorer:
    return score_rouge


def build_cider(spice_root: Path | None, stack: ExitStack) -> Scorer:
    return score_cider


def build_meteor(spice_root: Path | None, stack: ExitStack) -> Scorer:
    """Starts METEOR's process, which loads its tables while the other metrics are computed."""
    from captioning.metrics.meteor import Meteor

    meteor = stack.enter_context(Meteor())

    def score(tokenized: Tokenized) -> dict[str, MetricScores]:
        groups, images = meteor.score(tokenized.references, tokenized.hypotheses, tokenized.groups)
        return {"METEOR": MetricScores(groups, images)}

    return score


def build_spice(spice_root: Path | None, stack: ExitStack) -> Scorer:
    from captioning.metrics.spice import find_models, score_spice

    find_models(spice_root)

    def score(tokenized: Tokenized) -> dict[str, MetricScores]:
        images = score_spice(
            tokenized.references, tokenized.hypotheses, spice_root, lambda process: stack.callback(process.kill)
        )
        return {"SPICE": MetricScores(_means(images, tokenized.groups), images)}

    return score


METRICS: dict[str, Builder] = {
    **{f"Bleu_{n + 1}": build_bleu for n in range(BLEU_ORDERS)},
    "METEOR": build_meteor,
    "ROUGE_L": build_rouge,
    "CIDEr": build_cider,
    "SPICE": build_spice,
}


def check_metrics(names: Sequence[str], spice_root: Path | None) -> None:
    """Raises CapstanError where a metric does not exist or lacks its models, before anything is computed."""
    for name in names:
        if name not in METRICS:
            raise unknown_name("metric", name, METRICS)
    if "SPICE" in names:
        from captioning.metrics.spice import find_models

        find_models(spice_root)


def score_captions(
    metrics: Sequence[str],
    references: Sequence[Sequence[str]],
    hypotheses: Sequence[str],
    groups: Sequence[Sequence[int]],
    spice_root: Path | None = None,
    parts: Path | None = None,
) -> dict[str, MetricScores]:
    """Scores untokenised captions; one tokenisation and one METEOR process for all groups.

    With `parts`, each metric is kept there as soon as it is computed, and one that is found there is not computed.

    Args:
        metrics: names in METRICS; the answer has them in this order.
        references: per image, its references (at least one).
        hypotheses: per image, its caption; an empty one scores 0.
        groups: sets of image indices, each to be scored as a corpus of its own; an empty one scores 0.
        parts: a folder that belongs to just these captions.

    Raises:
        CapstanError: an unknown metric, no Java, no SPICE models, or a Java program that fails.
    """
    check_metrics(metrics, spice_root)
    builders = {part_name(name): METRICS[name] for name in metrics}
    found = {name: load_scores(parts, name) for name in builders} if parts else {}
    scores = {metric: score for part in found.values() if part for metric, score in part.items()}
    missing = {name: build for name, build in builders.items() if not found.get(name)}
    if len(missing) < len(builders):
        num_left = sum(name not in scores for name in metrics)
        print(f"resumed: {len(metrics) - num_left} of {len(metrics)} metrics verified, {num_left} left", flush=True)
    if missing:
        scores |= _compute(missing, references, hypotheses, groups, spice_root, parts)
    return {name: scores[name] for name in metrics}


def _compute(
    builders: Mapping[str, Builder],
    references: Sequence[Sequence[str]],
    hypotheses: Sequence[str],
    groups: Sequence[Sequence[int]],
    spice_root: Path | None,
    parts: Path | None,
) -> dict[str, MetricScores]:
    """All metrics of the parts that are to be built."""
    from captioning.metrics.tokenizer import ptb_tokenize

    with ExitStack() as stack:
        # METEOR and SPICE wait for their processes, so in threads. On an interruption the pool, entered first, is left
        # last: after the processes, for which its threads wait, were stopped.
        pool = stack.enter_context(ThreadPoolExecutor())
        scorers = {name: build(spice_root, stack) for name, build in builders.items()}
        captions = {"hypotheses": list(hypotheses)}
        captions |= {f"references {i}": list(texts) for i, texts in enumerate(references)}
        tokens = ptb_tokenize(captions)
        tokenized = Tokenized(
            [tokens[f"references {i}"] for i in range(len(references))], tokens["hypotheses"], [list(g) for g in groups]
        )

        def score(name: str) -> dict[str, MetricScores]:
            found = scorers[name](tokenized)
            if parts:
                save_scores(parts, name, found)
            return found

        results = list(pool.map(score, scorers))
    return {name: score for result in results for name, score in result.items()}


def part_name(metric: str) -> str:
    """Metrics that one computation gives share a part."""
    return BLEU if METRICS[metric] is build_bleu else metric


def save_scores(parts: Path, name: str, scores: dict[str, MetricScores]) -> None:
    """Keeps what one computation gave, to the last bit: JSON's floats are their shortest exact form."""
    rows = [[metric, score.groups, score.images.tolist()] for metric, score in scores.items()]
    storage.write_part(parts / f"{name}.jsonl", rows, name)


def load_scores(parts: Path, name: str) -> dict[str, MetricScores] | None:
    """What `save_scores` kept; None where there is nothing whole (a damaged part is set aside)."""
    import numpy as np

    rows = storage.read_part(parts / f"{name}.jsonl", name)
    if rows is None:
        return None
    return {metric: MetricScores(groups, np.array(images, dtype=np.float64)) for metric, groups, images in rows}
