"""The table that every source makes: a row is one image, where it can be fetched, and what people say about it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash

from captioning import paths
from captioning.errors import CapstanError

T = TypeVar("T")

# Split names in the wild: Karpathy's `restval` is the part of COCO's val that everyone trains on.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "restval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One image."""

    image_id: str
    """`<source>/<the source's own id>`."""
    source: str
    split: str
    url: str
    """Its published address, or its name within the source: never a path of this machine, so digests are portable."""
    location: str
    """What img2dataset fetches: the same, or a `file://` URL."""
    captions: tuple[str, ...]
    boxes: str = "[]"
    """JSON list of `{"words": [...], "box": [left, top, right, bottom]}`, as fractions of width and height."""


def clean_captions(captions: Iterable[object]) -> tuple[str, ...]:
    """Captions with whitespace collapsed; missing (None, NaN) and blank ones left out."""
    texts = (" ".join(caption.split()) for caption in captions if isinstance(caption, str))
    return tuple(text for text in texts if text)


def split_name(name: object, where: str) -> str:
    """train, val or test from a file's own name of it.

    Raises:
        CapstanError: unknown; `where` says in which file or row.
    """
    split = SPLIT_NAMES.get(str(name).strip().lower())
    if split is None:
        raise CapstanError(f"{where}: unknown split {name!r}; use train, val or test")
    return split


def draw_splits(num_images: int, val_fraction: float, test_fraction: float, seed: int) -> list[str]:
    """A split for each of `num_images`, by one seeded shuffle; at least one image each where a fraction is not zero."""
    if val_fraction + test_fraction >= 1:
        raise CapstanError(f"val_fraction {val_fraction} and test_fraction {test_fraction} leave nothing to train on")
    num_val, num_test = (max(1, round(f * num_images)) if f > 0 else 0 for f in (val_fraction, test_fraction))
    if num_val + num_test >= num_images:
        raise CapstanError(f"{num_images} images cannot be split into train, val and test: add images")
    names = ["test"] * num_test + ["val"] * num_val + ["train"] * (num_images - num_val - num_test)
    order = np.random.default_rng(seed).permutation(num_images)
    splits = [""] * num_images
    for position, name in zip(order, names, strict=True):
        splits[position] = name
    return splits


def take_evenly(items: Sequence[T], num: int | None) -> list[T]:
    """At most `num` items, evenly spread over all, so that every split keeps its share."""
    if num is None or num >= len(items):
        return list(items)
    return [items[i * len(items) // num] for i in range(num)]


def file_url(path: Path) -> str:
    return path.resolve().as_uri()


def check_table(rows: Sequence[Row]) -> None:
    """Refuses a table that cannot give a trained and tested captioner.

    Raises:
        CapstanError: no rows, an image_id that stands twice, or a split without images.
    """
    if not rows:
        raise CapstanError("data.sources give no image at all: check source_settings")
    counts = Counter(row.image_id for row in rows)
    twice = [image_id for image_id, count in counts.items() if count > 1]
    if twice:
        shown = ", ".join(twice[:5])
        raise CapstanError(
            f"{len(twice)} image_id(s) stand more than once: {shown}. Give each image its own id "
            "(rows of one image belong under one id and one address)."
        )
    splits = Counter(row.split for row in rows if row.captions)
    for split in paths.SPLITS:
        if not splits[split]:
            raise CapstanError(
                f"no image with a caption is in the {split} split. Name the splits in the data (split_column, split "
                f"JSON), or set source_settings.<source>.{'test' if split == 'test' else 'val'}_fraction above 0."
            )


def table_digest(rows: Sequence[Row]) -> str:
    """xxh3-128 over everything that a row says, but where its file lies on this machine."""
    digest = xxhash.xxh3_128()
    for row in rows:
        fields = [row.image_id, row.source, row.split, row.url, row.captions, row.boxes]
        digest.update(json.dumps(fields).encode() + b"\n")
    return digest.hexdigest()
