"""`url_table`: any parquet or CSV of addresses and captions, such as LAION-COCO or RELAION-POP."""

from __future__ import annotations

import string
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlsplit

import xxhash

from captioning.archives import fetch_once
from captioning.source_params import UrlTableSource
from captioning.sources.records import merge_records, read_records, resolve_splits
from captioning.sources.table import Row, take_evenly


def _table_file(table: Path | str) -> Path:
    """The local file; one at an http address is fetched once and kept."""
    if not str(table).startswith(("http://", "https://")):
        return Path(table)
    return fetch_once(str(table), PurePosixPath(urlsplit(str(table)).path).name or "table", None)


def url_table_rows(settings: UrlTableSource, folder: Path, seed: int) -> list[Row]:
    """A row for each address; records of one address are one image with several captions.

    An image's id is its `id_column`, or a digest of its address. Addresses that cannot be fetched become failed rows.

    Raises:
        CapstanError: the table is missing or malformed.
    """
    path = _table_file(settings.table)
    columns = [settings.url_column, settings.caption_column]
    columns += [column for column in (settings.id_column, settings.split_column) if column]
    images = merge_records(
        path,
        read_records(path, list(dict.fromkeys(columns))),
        settings.url_column,
        settings.caption_column,
        settings.split_column,
        settings.id_column,
    )
    chosen = take_evenly(list(images.items()), settings.max_images)
    splits = resolve_splits(
        path,
        [merged for _, merged in chosen],
        settings.split_column,
        settings.val_fraction,
        settings.test_fraction,
        seed,
    )
    rows = []
    for (url, merged), split in zip(chosen, splits, strict=True):
        own_id = merged.image_id or xxhash.xxh3_64_hexdigest(url.encode())
        location = quote(url, safe=string.punctuation)  # spaces and letters outside of ASCII are not for the wire
        rows.append(Row(f"url_table/{own_id}", "url_table", split, url, location, tuple(merged.captions)))
    return rows
