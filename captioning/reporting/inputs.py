"""What the report reads, checked against each other: a row that is missing on one side is an error, never a gap."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captioning import paths, storage
from captioning.annotations import Annotation, load_annotations
from captioning.attention_maps import AttentionMaps, load_attention_maps
from captioning.errors import CapstanError

Curve = list[tuple[float, float]]
"""(step, value) in the order they were logged."""

CURVES = ("train/loss", "train/reward", "train/learning_rate", "val/loss", "val/CIDEr")


@dataclass(frozen=True)
class CaptionerResult:
    """All that is known of one captioner on the test split."""

    name: str
    captions: dict[str, str]
    """By image id."""
    scores: dict[str, Any]
    """Metric → value as pycocoevalcap scales them, and `num_images`, `by_source`."""
    image_scores: dict[str, dict[str, float]]
    """Metric → image id → value, for metrics that have one."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """By metric; empty for BLIP."""
    attention: AttentionMaps | None = None


@dataclass(frozen=True)
class ReportInputs:
    """Everything that the report shows, apart from provenance."""

    test: list[Annotation]
    captioners: list[CaptionerResult]
    statistics: dict[str, Any]
    thumbnails: dict[str, Path]
    """By image id, for the images that `prepare` kept one of."""


def required_inputs(captioners: Sequence[str], num_samples: int) -> list[tuple[Path, str]]:
    """Every path that the report needs with the stage that makes it, by name from params."""
    needed = [(paths.split_annotations("test"), "prepare"), (paths.STATISTICS, "prepare")]
    if num_samples:
        needed.append((paths.SAMPLES, "prepare"))
    for name in captioners:
        maker = "blip" if name == "blip" else f"generate@{name}"
        needed.append((paths.captions(name), maker))
        if name != "blip":
            needed += [(paths.attention(name), maker), (paths.training(name), f"train@{name}")]
        needed += [(paths.scores(name), f"score@{name}"), (paths.image_scores(name), f"score@{name}")]
    return needed


def load_inputs(captioners: Sequence[str]) -> ReportInputs:
    """Reads the inputs of the named captioners; files of other captioners are not looked at.

    Raises:
        CapstanError: a file is damaged, or its images are not those of the test split.
    """
    test = load_annotations(paths.split_annotations("test"))
    if not test:
        raise CapstanError(f"{paths.split_annotations('test')} holds no image: raise a source's test_fraction.")
    ids = [annotation.image_id for annotation in test]
    thumbnails = {image_id: path for image_id in ids if (path := thumbnail(image_id)).is_file()}
    results = [_load_captioner(name, ids) for name in captioners]
    return ReportInputs(test, results, storage.read_json(paths.STATISTICS), thumbnails)


def thumbnail(image_id: str) -> Path:
    """Where `prepare` puts an image's thumbnail if it keeps one."""
    return paths.SAMPLES / f"{image_id.replace('/', '__')}.jpg"


def _load_captioner(name: str, ids: list[str]) -> CaptionerResult:
    captions = _load_captions(name, ids)
    scores = _load_scores(name, len(ids))
    image_scores = _load_image_scores(name, ids)
    if name == "blip":
        return CaptionerResult(name, captions, scores, image_scores)
    attention = load_attention_maps(paths.attention(name))
    _check_ids(paths.attention(name), attention.image_ids, ids, f"generate@{name}")
    return CaptionerResult(name, captions, scores, image_scores, load_curves(name), attention)


def _load_captions(name: str, ids: list[str]) -> dict[str, str]:
    path, maker = paths.captions(name), "blip" if name == "blip" else f"generate@{name}"
    try:
        pairs = [(str(row["image_id"]), _encodable(str(row["caption"]))) for row in storage.read_json(path)]
    except (KeyError, TypeError) as error:
        raise CapstanError(f"{path} is not in COCO's results format ({error!r}). Run `dvc repro {maker}`.") from error
    _check_ids(path, [image_id for image_id, _ in pairs], ids, maker)
    return dict(pairs)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # JSON can hold lone surrogates, which no other format takes


def _load_scores(name: str, num_images: int) -> dict[str, Any]:
    path = paths.scores(name)
    tree = storage.read_json(path)
    if not isinstance(tree, dict) or not isinstance(tree.get(name), dict) or "by_source" not in tree[name]:
        raise CapstanError(f"{path} does not hold the scores of {name}. Run `dvc repro score@{name}`.")
    if tree[name].get("num_images") != num_images:
        raise CapstanError(
            f"{path} scores {tree[name].get('num_images')} images, the test split has {num_images}. "
            f"Run `dvc repro score@{name}`."
        )
    return dict(tree[name])


def _load_image_scores(name: str, ids: list[str]) -> dict[str, dict[str, float]]:
    import pyarrow.parquet as parquet

    path = paths.image_scores(name)
    try:
        columns = parquet.read_table(path).to_pydict()
        rows = columns.pop("image_id")
    except Exception as error:  # pyarrow has an exception for each kind of damage
        raise CapstanError(f"{path} is damaged ({error}). Run `dvc repro -f score@{name}`.") from error
    _check_ids(path, rows, ids, f"score@{name}")
    numbers = {key: values for key, values in columns.items() if all(isinstance(v, int | float) for v in values)}
    return {key: dict(zip(rows, map(float, values), strict=True)) for key, values in numbers.items()}


def _check_ids(path: Path, found: Iterable[str], expected: list[str], stage: str) -> None:
    """Every test image once; the error shows both sides of a mismatch."""
    rows = list(found)
    missing, unknown = sorted(set(expected) - set(rows)), sorted(set(rows) - set(expected))
    if missing or unknown or len(rows) != len(set(rows)):
        raise CapstanError(
            f"{path} has {len(rows)} rows for {len(set(rows))} images, the test split has {len(expected)}: "
            f"{len(missing)} missing (first: {missing[:1]}), {len(unknown)} unknown (first: {unknown[:1]}). "
            f"Run `dvc repro {stage}`."
        )


def load_curves(captioner: str) -> dict[str, Curve]:
    """DVCLive's history of a captioner: metric → curve.

    Raises:
        CapstanError: what training minimised or raised is missing, or a file is not what DVCLive writes.
    """
    root = paths.training(captioner) / "plots" / "metrics"
    curves = {name: _read_curve(root / f"{name}.tsv") for name in CURVES if (root / f"{name}.tsv").is_file()}
    if not curves.get("train/loss") and not curves.get("train/reward"):
        raise CapstanError(f"{root / 'train/loss.tsv'} is missing or empty. Run `dvc repro train@{captioner}`.")
    return curves


def _read_curve(path: Path) -> Curve:
    value_column = path.stem  # DVCLive heads the column with the last part of the metric's name
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t")
            return [(float(row["step"]), float(row[value_column])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise CapstanError(f"{path} is damaged ({error!r}). Run the captioner's `train` again.") from error


def choose_images(inputs: ReportInputs, num_images: int, with_boxes: bool = False) -> list[Annotation]:
    """The first images that have a thumbnail, the sources in turn.

    Args:
        with_boxes: images whose boxes are known come first.
    """
    shown = [annotation for annotation in inputs.test if annotation.image_id in inputs.thumbnails]
    ranks: dict[str, int] = {}
    order = []
    for annotation in sorted(shown, key=lambda a: (with_boxes and not a.boxes, a.image_id)):
        rank = ranks[annotation.source] = ranks.get(annotation.source, -1) + 1
        order.append((with_boxes and not annotation.boxes, rank, annotation.source, annotation.image_id, annotation))
    return [entry[-1] for entry in sorted(order, key=lambda entry: entry[:-1])[:num_images]]
