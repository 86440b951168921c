"""Inputs of the report stage as the other stages write them, small and drawn from a seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from captioning.attention_maps import write_attention_maps
from captioning.reporting.attention_scores import cell_overlaps

METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")
COLOURS = {"red": "#d33", "blue": "#36c", "green": "#2a5", "yellow": "#dc3"}
SHAPES = ("circle", "square", "triangle")
GRID = (7, 7)


def write_results(
    root: Path, captioners: Sequence[str], num_per_source: int = 4, sources: Sequence[str] = ("digits", "shapes"),
    px: int = 64, num_steps: int = 6, seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Writes everything that the report reads for these captioners; returns the test annotations as plain dicts."""
    generator = np.random.default_rng(seed)
    test = [_annotation(generator, source, number) for source in sources for number in range(num_per_source)]
    test.sort(key=lambda annotation: annotation["image_id"])
    _write_json(root / "data/prepared/test.json", test)
    samples = root / "data/prepared/samples"
    samples.mkdir(parents=True, exist_ok=True)
    for annotation in test[:: max(1, len(test) // 24)]:
        name = annotation["image_id"].replace("/", "__")
        draw_scene(annotation, px, generator).save(samples / f"{name}.jpg", quality=90)
    _write_json(root / "reports/data.json", _statistics(sources))
    for index, captioner in enumerate(captioners):
        write_captioner(root, captioner, test, generator, quality=0.5 + 0.12 * index, num_steps=num_steps)
    return test


def _annotation(generator: np.random.Generator, source: str, number: int) -> dict[str, Any]:
    names, boxes, words = [], [], list(generator.permutation(SHAPES)[:2])
    for place, shape in enumerate(words):
        colour = str(generator.choice(list(COLOURS)))
        size, left, top = generator.uniform(0.2, 0.35), 0.08 + 0.5 * place, generator.uniform(0.05, 0.6)
        names.append(f"{colour} {shape}")
        boxes.append({"words": [shape], "box": [left, top, left + size, top + size]})
    forms = ("a {} next to a {}", "a {} and a {} on a plain ground", "there is a {} beside a {}", "{} with {}")
    return {
        "image_id": f"{source}/{number:05d}", "source": source, "split": "test", "shard": "00000",
        "key": f"{number:08d}", "captions": [form.format(*names) for form in forms], "boxes": boxes,
    }  # fmt: skip


def draw_scene(annotation: dict[str, Any], px: int, generator: np.random.Generator) -> Image.Image:
    ground = tuple(int(v) for v in generator.integers(200, 245, 3))
    image = Image.new("RGB", (px, px), ground)
    pen = ImageDraw.Draw(image)
    first, second = annotation["captions"][0].removeprefix("a ").split(" next to a ")
    for name, entry in zip((first, second), annotation["boxes"], strict=True):
        colour, shape = name.split(" ")
        left, top, right, bottom = (v * px for v in entry["box"])
        if shape == "circle":
            pen.ellipse((left, top, right, bottom), fill=COLOURS[colour])
        elif shape == "square":
            pen.rectangle((left, top, right, bottom), fill=COLOURS[colour])
        else:
            pen.polygon([((left + right) / 2, top), (left, bottom), (right, bottom)], fill=COLOURS[colour])
    return image


def write_captioner(
    root: Path, captioner: str, test: list[dict[str, Any]], generator: np.random.Generator, quality: float = 0.6,
    num_steps: int = 6,
) -> None:  # fmt: skip
    """Captions, scores and, for all but BLIP, attention maps and a training history."""
    captions = {a["image_id"]: str(generator.choice(a["captions"][:2])) for a in test}
    _write_json(root / f"data/captions/{captioner}.json", [{"image_id": i, "caption": c} for i, c in captions.items()])
    values = {metric: np.clip(generator.normal(quality, 0.2, len(test)), 0, 2) for metric in METRICS}
    groups = {
        source: [i for i, a in enumerate(test) if a["source"] == source] for source in {a["source"]: 0 for a in test}
    }
    scores = {metric: float(column.mean()) for metric, column in values.items()} | {"num_images": len(test)}
    by_source = {
        source: {m: float(values[m][rows].mean()) * 1.1 for m in METRICS} | {"num_images": len(rows)}
        for source, rows in groups.items()
    }
    _write_json(root / f"reports/scores/{captioner}.json", {captioner: {**scores, "by_source": by_source}})
    columns = {name: [a[name] for a in test] for name in ("image_id", "source")}
    table = {**columns, "caption": list(captions.values()), "references": [a["captions"] for a in test], **values}
    (root / "data/scores").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), root / f"data/scores/{captioner}.parquet")
    if captioner != "blip":
        maps = ((a["image_id"], *_attention(captions[a["image_id"]], a, generator, quality)) for a in test)
        write_attention_maps(root / f"data/captions/{captioner}.attention.h5", GRID, maps)
        _write_history(root / f"reports/training/{captioner}/plots/metrics", generator, quality, num_steps)


def _attention(
    caption: str, annotation: dict[str, Any], generator: np.random.Generator, quality: float
) -> tuple[list[str], np.ndarray]:
    tokens = [*caption.split(), "<eos>"]
    rows = generator.gamma(0.6, 1, (len(tokens), GRID[0] * GRID[1])) + 0.05
    for row, token in zip(rows, tokens, strict=True):
        for entry in annotation["boxes"]:
            if token in entry["words"]:
                row += 30 * quality * cell_overlaps(GRID, entry["box"]) * generator.random()
    return tokens, rows / rows.sum(axis=1, keepdims=True)


def _write_history(folder: Path, generator: np.random.Generator, quality: float, num_steps: int) -> None:
    steps = np.arange(1, num_steps + 1) * 10
    noise = generator.normal(0, 0.05, num_steps)
    epochs = steps[num_steps // 6 - 1 :: max(1, num_steps // 6)]
    rise = 1 - np.exp(-epochs / steps[-1] * 4)
    curves = {
        "train/loss": (steps, 1.6 + 3 * np.exp(-steps / steps[-1] * 5) + noise),
        "train/learning_rate": (steps, 1e-3 * np.minimum(steps / 50, 0.5 + 0.5 * np.cos(np.pi * steps / steps[-1]))),
        "val/loss": (epochs, 1.8 + 2.5 * np.exp(-epochs / steps[-1] * 5)),
        "val/CIDEr": (epochs, quality * rise * 1.2 + generator.normal(0, 0.01, len(epochs))),
    }
    for name, (at, values) in curves.items():
        path = folder / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{step}\t{value!r}" for step, value in zip(at.tolist(), values.tolist(), strict=True)]
        path.write_text("\n".join([f"step\t{path.stem}", *lines]) + "\n", "utf-8")


def _statistics(sources: Sequence[str]) -> dict[str, Any]:
    histogram = {"5": 40, "6": 210, "7": 380, "8": 260, "9": 90, "11": 20}
    part = {
        "num_images": 700, "num_captions": 3500, "captions_per_image": 5.0, "num_words": 24150, "mean_length": 7.12,
        "max_length": 11, "unknown_rate": 0.0012, "length_histogram": histogram,
    }  # fmt: skip
    small = part | {"num_images": 100, "num_captions": 500, "length_histogram": {"4": 3, "6": 50, "7": 40, "10": 9}}
    splits = {"train": part, "val": small, "test": small | {"unknown_rate": 0.004}}
    return {
        "vocabulary": {"size": 214, "max_length": 14, "coverage_of_distinct_words": 0.981}, **splits,
        "sources": {source: splits for source in sources},
    }  # fmt: skip


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")
