"""Sources of images and captions: a registry of functions that make a table (`captioning.sources.table.Row`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from captioning.errors import CapstanError, unknown_name
from captioning.source_params import SourceSettings
from captioning.sources import coco, digits, flickr, folder, shapes, url_table
from captioning.sources.table import Row

# name -> function(settings, folder, seed) -> rows. `folder` is for files that it draws or unpacks.
SOURCES: dict[str, Callable[[Any, Path, int], list[Row]]] = {
    "shapes": shapes.shapes_rows,
    "digits": digits.digits_rows,
    "flickr8k": flickr.flickr8k_rows,
    "flickr30k": flickr.flickr30k_rows,
    "coco2014": coco.coco2014_rows,
    "coco2017": coco.coco2017_rows,
    "folder": folder.folder_rows,
    "url_table": url_table.url_table_rows,
}


def build_table(names: list[str], settings: SourceSettings, work: Path, seed: int) -> list[Row]:
    """The rows of all sources, in the order of `names`.

    Args:
        work: each source draws or unpacks into a folder of its own name below.
        seed: draws the splits of sources that bring none.

    Raises:
        CapstanError: an unknown name, or one that stands twice; what a source finds wrong.
    """
    rows: list[Row] = []
    for name in names:
        if name not in SOURCES:
            raise unknown_name("source", name, SOURCES)
        if names.count(name) > 1:
            raise CapstanError(f"data.sources lists {name} twice")
        rows += SOURCES[name](getattr(settings, name), work / name, seed)
    return rows
