"""Scores a captioner's captions of the test split: `python -m stages.score <captioner>`.

Reads data/captions/<captioner>.json and data/prepared/test.json; writes reports/scores/<captioner>.json (the whole test
split, and each source on its own with CIDEr's document frequencies counted within that source's images) and
data/scores/<captioner>.parquet (each image). O(5 s) for some hundred images, half of it to ready METEOR. A killed
run goes on with the metrics that are not yet computed.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning import paths, stage, storage, tracked
from captioning.annotations import Annotation, load_annotations
from captioning.errors import CapstanError, unknown_name
from captioning.params import load_params
from captioning.work import fingerprint, open_work

if TYPE_CHECKING:
    from captioning.metrics.scoring import MetricScores

NUM_DIGITS = 6
NUM_SHOWN = 5


def read_hypotheses(path: Path, test: Sequence[Annotation], captioner: str) -> list[str]:
    """The captions of a COCO results file in the order of `test`.

    Raises:
        CapstanError: not COCO results, or an image of the test split that is missing, unknown or there twice.
    """
    results = storage.read_json(path)
    remedy = f"Remake it with `dvc repro {_stage_of(captioner)}`."
    if not isinstance(results, list) or not all(_is_result(entry) for entry in results):
        raise CapstanError(f'{path} is not a list of {{"image_id": ..., "caption": ...}} (COCO results). {remedy}')
    counts = Counter(entry["image_id"] for entry in results)
    wanted = {annotation.image_id for annotation in test}
    problems = {
        "missing": sorted(wanted - counts.keys()),
        "unknown": sorted(counts.keys() - wanted),
        "more than once": sorted(image_id for image_id, count in counts.items() if count > 1),
    }
    found = [f"{len(ids)} image ids {what}: {_some(ids)}" for what, ids in problems.items() if ids]
    if found:
        raise CapstanError(f"{path} does not fit {paths.split_annotations('test')}: {'; '.join(found)}. {remedy}")
    # JSON can hold lone surrogates, which no other format takes.
    captions = {entry["image_id"]: entry["caption"].encode("utf-8", "replace").decode() for entry in results}
    return [captions[annotation.image_id] for annotation in test]


def _is_result(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("image_id", "caption"))


def _some(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - NUM_SHOWN} more" if len(ids) > NUM_SHOWN else ""
    return ", ".join(ids[:NUM_SHOWN]) + more


def _stage_of(captioner: str) -> str:
    return "blip" if captioner == "blip" else f"generate@{captioner}"


def _check_references(test: Sequence[Annotation]) -> None:
    if not test:
        raise CapstanError(
            f"{paths.split_annotations('test')} holds no image: give the sources a test split (test_fraction)"
        )
    counts = Counter(annotation.image_id for annotation in test)
    if twice := sorted(image_id for image_id, count in counts.items() if count > 1):
        raise CapstanError(f"{paths.split_annotations('test')} names images more than once: {_some(twice)}")
    if without := sorted(annotation.image_id for annotation in test if not annotation.captions):
        raise CapstanError(f"{paths.split_annotations('test')} has images without captions: {_some(without)}")


def summarize(scores: dict[str, MetricScores], group: int, num_images: int) -> dict[str, float | int]:
    """One group's scores, rounded for a file that git tracks."""
    values: dict[str, float | int] = {name: round(score.groups[group], NUM_DIGITS) for name, score in scores.items()}
    return {**values, "num_images": num_images}


def write_image_scores(
    target: Path, test: Sequence[Annotation], hypotheses: list[str], scores: dict[str, MetricScores]
) -> None:
    """A row per test image: image_id, source, caption, references, and each metric as float64."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "image_id": [annotation.image_id for annotation in test],
        "source": [annotation.source for annotation in test],
        "caption": hypotheses,
        "references": pa.array([annotation.captions for annotation in test], pa.list_(pa.string())),
        **{name: score.images for name, score in scores.items()},
    }
    with storage.atomic_write(target) as temporary:
        pq.write_table(pa.table(columns), temporary)


def score(
    *, captioner: str, captions: Path, annotations: Path, metrics: list[str], spice_root: Path | None
) -> dict[str, Any]:
    """Scores one captioner, writes both files, and returns what the JSON file holds.

    Raises:
        CapstanError: captions that do not fit the test split, an unknown metric, no Java, no SPICE models.
    """
    from captioning.metrics.scoring import check_metrics, score_captions

    check_metrics(metrics, spice_root)
    test = sorted(load_annotations(annotations), key=lambda annotation: annotation.image_id)
    _check_references(test)
    hypotheses = read_hypotheses(captions, test, captioner)
    sources: dict[str, list[int]] = {annotation.source: [] for annotation in test}
    for index, annotation in enumerate(test):
        sources[annotation.source].append(index)
    groups = [list(range(len(test))), *sources.values()]
    # Not of the metrics' names: one that is added is computed alone.
    name = fingerprint("score", {}, [captions, annotations], ["pycocoevalcap", "numpy"])
    with open_work("score", name, about={"captioner": captioner}) as work:
        references = [list(a.captions) for a in test]
        scores = score_captions(metrics, references, hypotheses, groups, spice_root, work.folder / "parts")
        summaries = [summarize(scores, number, len(group)) for number, group in enumerate(groups)]
        report = {captioner: {**summaries[0], "by_source": dict(zip(sources, summaries[1:], strict=True))}}
        write_image_scores(paths.image_scores(captioner), test, hypotheses, scores)
        storage.write_json(paths.scores(captioner), report)
    # Not marked as published: the parts are small, and stay for when a metric is added.
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.score", description=__doc__)
    parser.add_argument("captioner", help="<encoder>-<decoder>, or blip")
    captioner = parser.parse_args().captioner
    params = load_params()
    if captioner not in params.captioners():
        raise unknown_name("captioner", captioner, params.captioners())
    with stage.running(params):
        report = score(
            captioner=captioner,
            captions=tracked.require(paths.captions(captioner), _stage_of(captioner)),
            annotations=tracked.require(paths.split_annotations("test"), "prepare"),
            metrics=params.score.metrics,
            spice_root=params.score.spice_root,
        )
    values = report[captioner]
    print(f"{captioner}: " + ", ".join(f"{name} {values[name]:.3f}" for name in params.score.metrics))


if __name__ == "__main__":
    stage.run(main)
