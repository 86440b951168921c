"""The metrics by name, over PTB tokens, as pycocoevalcap computes them: for groups of images and for each image.

BLEU and METEOR of a group come from its summed counts; ROUGE_L, CIDEr and SPICE are means over its images. CIDEr's
document frequencies are counted over the group's own images, so a source's CIDEr does not depend on which sources stand
beside it; an image's own CIDEr is that within all the images.

All that depends on the references alone is computed once, for as many captioners as are scored together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from captioning import storage
from captioning.errors import CapstanError, unknown_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLEU_ORDERS = 4
BLEU = "Bleu"
"""The part of all orders, which one computation gives."""


@dataclass(frozen=True)
class MetricScores:
    """One metric: a score for each group, and one for each image: (num_images,) float64."""

    groups: list[float]
    images: NDArray[np.float64]


@dataclass(frozen=True)
class Task:
    """What a metric is built from. Captions are PTB words with one space between."""

    references: list[list[str]]
    hypotheses: dict[str, list[str]]
    """Per captioner, one an image: those that the metric will score."""

    groups: list[list[int]]
    """Sets of image indices, the scores' units."""

    spice_root: Path | None
    stack: ExitStack
    """Ends processes that are started."""


Scorer = Callable[[list[str]], dict[str, MetricScores]]
"""Scores one captioner's hypotheses."""

Builder = Callable[[Task], Scorer]
"""Does what the references alone need."""


def _words(captions: Sequence[str]) -> list[list[str]]:
    return [caption.split() for caption in captions]


def _means(images: NDArray[np.float64], groups: list[list[int]]) -> list[float]:
    return [float(images[group].mean()) if group else 0.0 for group in groups]


def build_bleu(task: Task) -> Scorer:
    from captioning.metrics.bleu import Bleu

    bleu = Bleu([_words(captions) for captions in task.references])

    def score(hypotheses: list[str]) -> dict[str, MetricScores]:
        groups, images = bleu.score(_words(hypotheses), task.groups)
        return {f"Bleu_{n + 1}": MetricScores([group[n] for group in groups], images[n]) for n in range(BLEU_ORDERS)}

    return score


def build_rouge(task: Task) -> Scorer:
    from captioning.metrics.rouge import RougeL

    rouge = RougeL(task.references)

    def score(hypotheses: list[str]) -> dict[str, MetricScores]:
        images = rouge.score(hypotheses)
        return {"ROUGE_L": MetricScores(_means(images, task.groups), images)}

    return score


def build_cider(task: Task) -> Scorer:
    from captioning.metrics.cider import CiderD

    references = [_words(captions) for captions in task.references]
    everything = tuple(range(len(references)))
    corpora = dict.fromkeys([everything, *(tuple(group) for group in task.groups if group)])
    metrics = {corpus: CiderD([references[i] for i in corpus]) for corpus in corpora}

    def score(hypotheses: list[str]) -> dict[str, MetricScores]:
        words = _words(hypotheses)
        found = {corpus: metric.score([words[i] for i in corpus]) for corpus, metric in metrics.items()}
        groups = [found[tuple(group)][0] if group else 0.0 for group in task.groups]
        return {"CIDEr": MetricScores(groups, found[everything][1])}

    return score


def build_meteor(task: Task) -> Scorer:
    from captioning.metrics.meteor import Meteor, num_useful_processes, paraphrase_table
    from captioning.metrics.paraphrases import open_relevant

    references = [caption for captions in task.references for caption in captions]
    hypotheses = [caption for captions in task.hypotheses.values() for caption in captions]
    with open_relevant(paraphrase_table(), references, hypotheses) as paraphrases:
        meteor = task.stack.enter_context(Meteor(paraphrases, num_useful_processes(len(hypotheses))))

    def score(hypotheses: list[str]) -> dict[str, MetricScores]:
        groups, images = meteor.score(task.references, hypotheses, task.groups)
        return {"METEOR": MetricScores(groups, images)}

    return score


def build_spice(task: Task) -> Scorer:
    from captioning.metrics.spice import score_spice

    def score(hypotheses: list[str]) -> dict[str, MetricScores]:
        images = score_spice(
            task.references, hypotheses, task.spice_root, lambda process: task.stack.callback(process.kill)
        )
        return {"SPICE": MetricScores(_means(images, task.groups), images)}

    return score


METRICS: dict[str, Builder] = {
    **{f"Bleu_{n + 1}": build_bleu for n in range(BLEU_ORDERS)},
    "METEOR": build_meteor,
    "ROUGE_L": build_rouge,
    "CIDEr": build_cider,
    "SPICE": build_spice,
}
WITH_PROCESSES = ("METEOR", "SPICE")


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
    """Scores one captioner's untokenised captions: `score_captioners` for one."""
    kept = {"": parts} if parts else None
    return score_captioners(metrics, references, {"": hypotheses}, groups, spice_root, kept)[""]


def score_captioners(
    metrics: Sequence[str],
    references: Sequence[Sequence[str]],
    hypotheses: Mapping[str, Sequence[str]],
    groups: Sequence[Sequence[int]],
    spice_root: Path | None = None,
    parts: Mapping[str, Path] | None = None,
) -> dict[str, dict[str, MetricScores]]:
    """Scores untokenised captions of several captioners: one tokenisation, and the metrics side by side.

    With `parts`, each metric of a captioner is kept there as soon as it is computed, and one that is found there is not
    computed.

    Args:
        metrics: names in METRICS; each captioner's answer has them in this order.
        references: per image, its references (at least one).
        hypotheses: per captioner and image, the caption; an empty one scores 0.
        groups: sets of image indices, each to be scored as a corpus of its own; an empty one scores 0.
        parts: per captioner, a folder that belongs to just these captions.

    Raises:
        CapstanError: an unknown metric, not a caption for each image, no Java, no SPICE models, or a Java program that
            fails.
    """
    check_metrics(metrics, spice_root)
    for captioner, captions in hypotheses.items():
        if len(captions) != len(references):
            whose = f" of {captioner}" if captioner else ""
            raise CapstanError(f"{len(captions)} captions{whose} for {len(references)} images")
    found = {captioner: _load_all(parts[captioner], metrics) if parts else {} for captioner in hypotheses}
    missing = {part_name(name): [c for c, scores in found.items() if name not in scores] for name in metrics}
    num_left = sum(name not in scores for scores in found.values() for name in metrics)
    if num_left < (total := len(metrics) * len(hypotheses)):
        print(f"resumed: {total - num_left} of {total} metrics verified, {num_left} left", flush=True)
    if num_left:
        tokens = _tokenize(references, {c: hypotheses[c] for captioners in missing.values() for c in captioners})
        for captioner, scores in _compute(missing, *tokens, [list(group) for group in groups], spice_root, parts):
            found[captioner] |= scores
    return {captioner: {name: scores[name] for name in metrics} for captioner, scores in found.items()}


def _tokenize(
    references: Sequence[Sequence[str]], hypotheses: Mapping[str, Sequence[str]]
) -> tuple[list[list[str]], dict[str, list[str]]]:
    from captioning.metrics.tokenizer import ptb_tokenize

    captions = {f"references {i}": texts for i, texts in enumerate(references)}
    tokens = ptb_tokenize(captions | {f"hypotheses {captioner}": texts for captioner, texts in hypotheses.items()})
    by_captioner = {captioner: tokens[f"hypotheses {captioner}"] for captioner in hypotheses}
    return [tokens[name] for name in captions], by_captioner


def _compute(
    missing: Mapping[str, list[str]],
    references: list[list[str]],
    hypotheses: Mapping[str, list[str]],
    groups: list[list[int]],
    spice_root: Path | None,
    parts: Mapping[str, Path] | None,
) -> list[tuple[str, dict[str, MetricScores]]]:
    """Of each part the captioners for which it is missing: computed, kept in `parts`, and returned with their names."""
    builders = {part_name(name): build for name, build in METRICS.items()}

    def score(name: str, scorer: Scorer) -> list[tuple[str, dict[str, MetricScores]]]:
        found = []
        for captioner in missing[name]:
            found.append((captioner, scorer(hypotheses[captioner])))
            if parts:
                save_scores(parts[captioner], name, found[-1][1])
        return found

    with ExitStack() as stack:
        # On an interruption the pool, entered first, is left last: after the processes, for which its threads wait,
        # were stopped.
        pool = stack.enter_context(ThreadPoolExecutor())
        futures = []
        # Those that wait for processes come first, and share the machine with the building of the others.
        for name in sorted(filter(missing.get, missing), key=lambda name: name not in WITH_PROCESSES):
            wanted = {captioner: hypotheses[captioner] for captioner in missing[name]}
            scorer = builders[name](Task(references, wanted, groups, spice_root, stack))
            futures.append(pool.submit(score, name, scorer))
        return [entry for future in futures for entry in future.result()]


def part_name(metric: str) -> str:
    """Metrics that one computation gives share a part."""
    return BLEU if METRICS[metric] is build_bleu else metric


def save_scores(parts: Path, name: str, scores: dict[str, MetricScores]) -> None:
    """Keeps what one computation gave, to the last bit: JSON's floats are their shortest exact form."""
    rows = [[metric, score.groups, score.images.tolist()] for metric, score in scores.items()]
    storage.write_part(parts / f"{name}.jsonl", rows, name)


def _load_all(parts: Path, metrics: Sequence[str]) -> dict[str, MetricScores]:
    loaded = [load_scores(parts, name) for name in dict.fromkeys(map(part_name, metrics))]
    return {metric: scores for found in loaded if found for metric, scores in found.items()}


def load_scores(parts: Path, name: str) -> dict[str, MetricScores] | None:
    """What `save_scores` kept; None where there is nothing whole (a damaged part is set aside)."""
    import numpy as np

    rows = storage.read_part(parts / f"{name}.jsonl", name)
    if rows is None:
        return None
    return {metric: MetricScores(groups, np.array(images, dtype=np.float64)) for metric, groups, images in rows}
