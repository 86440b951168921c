"""The report's pictures: figures drawn from the inputs, sample images, and attention maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from captioning.annotations import Annotation
from captioning.errors import CapstanError
from captioning.figures.overlays import MAX_WORDS, WordMap, draw_attention, overlay
from captioning.reporting.attention_scores import attention_factor, named_box
from captioning.reporting.inputs import CaptionerResult, ReportInputs
from captioning.reporting.leaderboard import ALL, RANKED_BY, Row, Table
from captioning.reporting.page import AttentionSample, Sample, data_uri, picture_uri
from captioning.reporting.statistics import Statistics


def draw_figures(
    folder: Path, captioners: Sequence[str], inputs: ReportInputs, tables: Sequence[Table], statistics: Statistics
) -> dict[str, tuple[str, str]]:
    """Draws every figure that has data into `folder`; returns name → (light, dark) data URIs."""
    from captioning.figures.curves import draw_training
    from captioning.figures.histograms import draw_lengths, draw_shares
    from captioning.figures.intervals import draw_intervals

    curves = {result.name: result.curves for result in inputs.captioners}
    names = draw_training(folder, captioners, curves)
    ciders = _marks(tables, _cider_mark)
    if ciders:
        title = "CIDEr; bars are 95 % intervals" if tables[0].rows[0].interval else "CIDEr"
        draw_intervals(folder, "cider", captioners, ciders, title=title, label="CIDEr × 100")
        names.append("cider")
    by_image = {
        result.name: list(result.image_scores[RANKED_BY].values())
        for result in inputs.captioners
        if RANKED_BY in result.image_scores
    }
    if by_image:
        draw_shares(folder, captioners, by_image)
        names.append("cider-by-image")
    factors = _marks(tables, _attention_mark)
    if factors:
        label = "attention in the named box ÷ a uniform map's"
        draw_intervals(
            folder, "attention", captioners, factors, title="Attention on what is named", label=label, reference=1.0
        )
        names.append("attention")
    if any(sum(counts.values()) for counts in statistics.lengths.values()):
        draw_lengths(folder, statistics.lengths)
        names.append("caption-lengths")
    light, dark = ([data_uri((folder / f"{name}{end}.png").read_bytes(), "png") for name in names] for end in ENDS)
    return dict(zip(names, zip(light, dark, strict=True), strict=True))


ENDS = ("", "-dark")
Mark = tuple[float, float, float]


def _cider_mark(row: Row) -> Mark | None:
    if RANKED_BY not in row.scores:
        return None
    value = row.scores[RANKED_BY]
    low, high = (row.interval.low, row.interval.high) if row.interval else (value, value)
    return 100 * value, 100 * low, 100 * high


def _attention_mark(row: Row) -> Mark | None:
    if row.attention is None:
        return None
    factor = row.attention.factor
    return factor.mean, factor.low, factor.high


def _marks(tables: Sequence[Table], mark: Callable[[Row], Mark | None]) -> dict[str, dict[str, Mark]]:
    marks = {}
    for table in tables:
        found = {row.captioner: value for row in table.rows if (value := mark(row))}
        if found:
            marks["all sources" if table.group == ALL else table.group] = found
    return marks


def build_samples(inputs: ReportInputs, chosen: Sequence[Annotation]) -> list[Sample]:
    """The chosen images with their references and every captioner's caption."""
    samples = []
    for annotation in chosen:
        image_id = annotation.image_id
        captions = [
            (result.name, result.captions[image_id], result.image_scores.get(RANKED_BY, {}).get(image_id))
            for result in inputs.captioners
        ]
        uri = data_uri(inputs.thumbnails[image_id].read_bytes(), "jpeg")
        samples.append(Sample(image_id, annotation.source, uri, list(annotation.captions), captions))
    return samples


def build_attention(
    folder: Path, captioners: Sequence[str], inputs: ReportInputs, chosen: Sequence[Annotation]
) -> list[AttentionSample]:
    """Word maps of the chosen images by every captioner that has attention; a PNG for each image goes to `folder`."""
    samples = []
    for annotation in chosen:
        photo = _read_rgb(inputs.thumbnails[annotation.image_id])
        rows = [
            (result.name, words)
            for result in inputs.captioners
            if (words := word_maps(result, annotation, photo))
        ]  # fmt: skip
        if not rows:
            continue
        draw_attention(folder / f"attention-{file_name(annotation.image_id)}.png", captioners, rows)
        shown = [(name, [(word, picture_uri(word.picture)) for word in words]) for name, words in rows]
        uri = data_uri(inputs.thumbnails[annotation.image_id].read_bytes(), "jpeg")
        samples.append(AttentionSample(annotation.image_id, annotation.source, uri, shown))
    return samples


def file_name(image_id: str) -> str:
    """An image id as part of a file's name, as `prepare` names its thumbnails."""
    return image_id.replace("/", "__")


def word_maps(result: CaptionerResult, annotation: Annotation, photo: NDArray[np.uint8]) -> list[WordMap]:
    """The overlays of an image's caption, word by word; the first MAX_WORDS of a long one."""
    maps = result.attention
    if maps is None:
        return []
    index = maps.image_ids.index(annotation.image_id)
    words = []
    for token, weights in list(zip(maps.tokens[index], maps[index], strict=True))[:MAX_WORDS]:
        box = named_box(token, annotation.boxes)
        factor = attention_factor(weights, maps.grid, box) if box else None
        words.append(WordMap("(end)" if token == "<eos>" else token, overlay(photo, weights, maps.grid, box), factor))
    return words


def _read_rgb(path: Path) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise CapstanError(f"{path} is damaged ({error}). Run `dvc repro -f prepare`.") from error
