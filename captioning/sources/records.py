"""CSV, TSV, JSON, JSON lines and parquet as records, and records of one image merged into one row."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captioning.errors import CapstanError
from captioning.sources.table import clean_captions, draw_splits, split_name

csv.field_size_limit(1 << 24)  # a caption in alt text can be longer than the default of 128 KiB

Record = Mapping[str, Any]


def read_records(path: Path, columns: list[str]) -> Iterator[Record]:
    """The file's records, each with all of `columns`.

    Raises:
        CapstanError: no such file, an unknown ending, damaged, or a column is missing (says which there are).
    """
    if not path.is_file():
        raise CapstanError(f"{path} is missing")
    endings = {".csv": _csv, ".tsv": _csv, ".json": _json, ".jsonl": _json_lines, ".parquet": _parquet}
    if path.suffix.lower() not in endings:
        raise CapstanError(f"{path}: unknown ending; use one of {', '.join(endings)}")
    try:
        for record in endings[path.suffix.lower()](path, columns):
            if missing := [column for column in columns if column not in record]:
                raise _missing(path, missing, list(record))
            yield record
    except (csv.Error, ValueError, OSError) as error:  # JSON and Unicode errors are ValueErrors, as CapstanError is
        if isinstance(error, CapstanError):
            raise
        raise CapstanError(f"{path} is damaged or not what its ending says: {error}") from error


def _missing(path: Path, missing: list[str], present: list[str]) -> CapstanError:
    return CapstanError(
        f"{path} has no column {', '.join(missing)}; it has {', '.join(present)}. Set the column names in params.yaml."
    )


def _csv(path: Path, columns: list[str]) -> Iterator[Record]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        yield from csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")


def _json(path: Path, columns: list[str]) -> Iterator[Record]:
    records = json.loads(path.read_text("utf-8-sig"))
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError("expected a list of objects")
    yield from records


def _json_lines(path: Path, columns: list[str]) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("expected an object in each line")
                yield record


def _parquet(path: Path, columns: list[str]) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        present = file.schema_arrow.names
        if missing := [column for column in columns if column not in present]:
            raise _missing(path, missing, present)
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error


@dataclass
class Merged:
    """All records of one image."""

    captions: list[str] = field(default_factory=list)
    split: object = None
    image_id: str = ""


def merge_records(
    path: Path,
    records: Iterable[Record],
    image_column: str,
    caption_column: str,
    split_column: str | None,
    id_column: str | None = None,
) -> dict[str, Merged]:
    """Captions by image in order of first appearance; a caption cell is a text or a list of texts.

    Raises:
        CapstanError: two records of an image name different splits or ids.
    """
    images: dict[str, Merged] = {}
    for number, record in enumerate(records, start=1):
        image = str(record[image_column] or "").strip() or f"missing address, record {number}"
        merged = images.setdefault(image, Merged())
        cell = record[caption_column]
        merged.captions += clean_captions(cell if isinstance(cell, (list, tuple)) else [cell])
        for column, name in ((split_column, "split"), (id_column, "image_id")):
            if column is None:
                continue
            value, known = str(record[column]).strip(), getattr(merged, name)
            if known and known != value:
                raise CapstanError(f"{path} record {number}: {image} has {column} {value!r} here, {known!r} before")
            setattr(merged, name, value)
    return images


def resolve_splits(
    path: Path, images: list[Merged], split_column: str | None, val_fraction: float, test_fraction: float, seed: int
) -> list[str]:
    """The split of each image: as the file names it, or drawn."""
    if split_column is None:
        return draw_splits(len(images), val_fraction, test_fraction, seed)
    return [split_name(image.split, f"{path} column {split_column}") for image in images]
