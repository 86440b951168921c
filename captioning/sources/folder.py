"""`folder`: your own images with a captions file (CSV, TSV, JSON, parquet; a row per image and caption)."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from captioning.errors import CapstanError
from captioning.source_params import FolderSource
from captioning.sources.records import merge_records, read_records, resolve_splits
from captioning.sources.table import Row, file_url


def _inside(name: str, origin: Path) -> str:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise CapstanError(f"{origin} names {name!r}, which is not below the folder: use paths relative to it")
    return path.as_posix()


def folder_rows(settings: FolderSource, folder: Path, seed: int) -> list[Row]:
    """A row for each image that the captions file names; files without captions are not used.

    Raises:
        CapstanError: the folder or the captions file is missing or malformed, or a path leads out of the folder.
    """
    if not settings.root.is_dir():
        raise CapstanError(f"source_settings.folder.root {settings.root} is not a folder")
    path = settings.root / settings.captions_file
    columns = [settings.image_column, settings.caption_column]
    columns += [settings.split_column] if settings.split_column else []
    images = merge_records(
        path, read_records(path, columns), settings.image_column, settings.caption_column, settings.split_column
    )
    splits = resolve_splits(
        path, list(images.values()), settings.split_column, settings.val_fraction, settings.test_fraction, seed
    )
    rows = []
    for (name, merged), split in zip(images.items(), splits, strict=True):
        inside = _inside(name, path)
        location = file_url(settings.root / inside)
        rows.append(Row(f"folder/{inside}", "folder", split, inside, location, tuple(merged.captions)))
    return rows
