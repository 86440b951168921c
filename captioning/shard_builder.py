"""From the table to shards, chunk by chunk: fetch, normalise, pack, scan, commit.

A chunk is the rows of one shard. It is committed by its ledger part, written after its tar; a rerun keeps each chunk
whose part matches the table and whose tar matches the part, and makes the others anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from captioning import storage
from captioning.errors import CapstanError
from captioning.fetching import Fetched, fetch
from captioning.images import ImageError, StoredImage, normalise_image
from captioning.params import DownloadParams
from captioning.shards import (
    PERMANENT,
    SUCCESS,
    TRANSIENT,
    LedgerRow,
    ShardWriter,
    digest_bytes,
    read_ledger_metadata,
    read_ledger_part,
    scan_shard,
    write_ledger,
)
from captioning.sources.table import Row, table_digest

TAR_DIGEST = "tar_digest"


@dataclass(frozen=True)
class Chunk:
    """The rows of one shard."""

    shard: str
    first: int
    """The number of its first row in the whole table."""
    rows: tuple[Row, ...]
    key_width: int
    folder: Path

    @property
    def tar(self) -> Path:
        return self.folder / "shards" / f"{self.shard}.tar"

    @property
    def part(self) -> Path:
        return self.folder / "parts" / f"{self.shard}.parquet"

    def key(self, position: int) -> str:
        return f"{self.first + position:0{self.key_width}d}"


def make_chunks(rows: Sequence[Row], samples_per_shard: int, folder: Path) -> list[Chunk]:
    """Cuts the table. Shards are numbered from 00000; keys are row numbers, at least 8 digits, all equally long."""
    key_width = max(8, len(str(len(rows))))
    starts = range(0, len(rows), samples_per_shard)
    shard_width = max(5, len(str(len(starts))))
    return [
        Chunk(f"{number:0{shard_width}d}", start, tuple(rows[start : start + samples_per_shard]), key_width, folder)
        for number, start in enumerate(starts)
    ]


def build_chunk(chunk: Chunk, download: DownloadParams, heartbeat: Callable[[int], None]) -> None:
    """Fetches, normalises, packs, scans and commits one chunk. `heartbeat(n)`: n more rows are settled (0: alive)."""
    raw = chunk.folder / "raw" / chunk.shard
    asked = [i for i, row in enumerate(chunk.rows) if row.captions]
    fetched = fetch(
        [chunk.rows[i].location for i in asked],
        raw,
        timeout_s=download.timeout_s,
        num_threads=download.num_threads,
        num_retries=download.num_retries,
        max_bytes=download.max_image_bytes,
        heartbeat=lambda: heartbeat(0),
    )
    outcomes: dict[int, Fetched] = dict(zip(asked, fetched, strict=True))
    chunk.tar.parent.mkdir(parents=True, exist_ok=True)
    ledger = []
    with storage.atomic_write(chunk.tar) as temporary:
        with ShardWriter(temporary) as writer:
            for position, row in enumerate(chunk.rows):
                ledger.append(_settle(chunk, position, row, outcomes.get(position), download, writer))
                heartbeat(1)
        scan_shard(temporary, ledger)
    if not any(row.status == SUCCESS for row in ledger):
        chunk.tar.unlink()
    tar_digest = storage.digest_file(chunk.tar) if chunk.tar.exists() else ""
    write_ledger(chunk.part, ledger, {"table_digest": table_digest(chunk.rows), TAR_DIGEST: tar_digest})
    shutil.rmtree(raw, ignore_errors=True)


def _settle(
    chunk: Chunk, position: int, row: Row, fetched: Fetched | None, download: DownloadParams, writer: ShardWriter
) -> LedgerRow:
    """Stores one row's image if it is fit, and says what became of it."""
    if fetched is None:
        return _ledger_row(row, PERMANENT, "no caption")
    if fetched.status:
        return _ledger_row(row, fetched.status, fetched.reason)
    try:
        image = normalise_image(fetched.read(), download.image_px, download.jpeg_quality, download.max_image_pixels)
    except ImageError as error:
        return _ledger_row(row, PERMANENT, error.reason)
    key = chunk.key(position)
    record = {"image_id": row.image_id, "source": row.source, "split": row.split, "url": row.url}
    writer.add(key, image.jpeg, record | {"width": image.width, "height": image.height})
    return _ledger_row(row, SUCCESS, "", chunk.shard, key, image)


def _ledger_row(
    row: Row,
    status: str,
    reason: str,
    shard: str | None = None,
    key: str | None = None,
    image: StoredImage | None = None,
) -> LedgerRow:
    return LedgerRow(
        image_id=row.image_id,
        source=row.source,
        split=row.split,
        url=row.url,
        status=status,
        reason=reason,
        shard=shard,
        key=key,
        width=image.width if image else None,
        height=image.height if image else None,
        digest=digest_bytes(image.jpeg) if image else None,
        captions=list(row.captions),
        boxes=row.boxes,
    )


def finished_rows(chunk: Chunk) -> list[LedgerRow] | None:
    """The ledger rows of a chunk that an earlier run committed and that is still whole; None if there is none.

    A damaged tar or part is set aside as `*.corrupt` and named.
    """
    if not chunk.part.exists():
        return None
    try:
        rows, metadata = read_ledger_part(chunk.part)
    except CapstanError:
        storage.set_aside(chunk.part, _aside(chunk))
        return None
    if metadata.get("table_digest") != table_digest(chunk.rows):
        chunk.part.unlink()
        return None
    found = storage.digest_file(chunk.tar) if chunk.tar.exists() else ""
    if found != metadata.get(TAR_DIGEST):
        if chunk.tar.exists():
            storage.set_aside(chunk.tar, _aside(chunk))
        chunk.part.unlink()
        return None
    return rows


def tar_digests(chunks: Sequence[Chunk]) -> dict[str, str]:
    """Digests of the tars of committed chunks, by shard; a chunk without any image has none."""
    found = {chunk.shard: read_ledger_metadata(chunk.part)[TAR_DIGEST] for chunk in chunks}
    return {shard: digest for shard, digest in found.items() if digest}


def _aside(chunk: Chunk) -> Path:
    """Outside the folder that becomes an output."""
    return chunk.part.parent.parent / "corrupt"


def forget_transient(chunks: Sequence[Chunk]) -> None:
    """Uncommits the chunks with transient failures, so that the next run asks again."""
    for chunk in chunks:
        rows = finished_rows(chunk)
        if rows is not None and any(row.status == TRANSIENT for row in rows):
            chunk.part.unlink()
