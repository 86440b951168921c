"""Shards: canonical tars of `<key>.jpg` and `<key>.json`, and the ledger that says what became of every row.

A shard's bytes depend only on its samples: keys in order, no times, no owners. So two runs give equal digests, whatever
order the network answered in. The ledger holds the digest of each tar and of itself; who reads shards verifies them.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from captioning import paths, storage
from captioning.errors import CapstanError, DamagedError
from captioning.images import ImageError as ImageError
from captioning.images import decode_image as decode_image

if TYPE_CHECKING:
    import pyarrow as pa

SUCCESS, PERMANENT, TRANSIENT = "success", "permanent", "transient"
TARS, ROWS, SEAL = "tar_digests", "rows_digest", "digest"
"""Keys of the ledger's metadata: digests of the tars by name, of the rows, and of the metadata itself."""


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """What became of one row of the table. The last five are None on failure."""

    image_id: str
    source: str
    split: str
    url: str
    status: str
    reason: str
    shard: str | None
    key: str | None
    width: int | None
    height: int | None
    digest: str | None
    """xxh3-128 of the stored JPEG."""
    captions: list[str]
    boxes: str


def ledger_schema() -> pa.Schema:
    import pyarrow as pa

    strings = ("image_id", "source", "split", "url", "status", "reason", "shard", "key")
    return pa.schema(
        [
            *((name, pa.string()) for name in strings),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("digest", pa.string()),
            ("captions", pa.list_(pa.string())),
            ("boxes", pa.string()),
        ]
    )


def write_ledger(target: Path, rows: Sequence[LedgerRow], metadata: dict[str, str] | None = None) -> None:
    """Writes the ledger, or a part of it, atomically; `metadata` goes into its schema, with digests of it all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    told = {**(metadata or {}), ROWS: _digest_rows(rows)}
    schema = ledger_schema().with_metadata({**told, SEAL: _digest_metadata(told)})
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=schema)
    with storage.atomic_write(target) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _digest_rows(rows: Sequence[LedgerRow]) -> str:
    digest, values = xxhash.xxh3_128(), attrgetter(*LedgerRow.__slots__)
    for row in rows:
        digest.update(json.dumps(values(row)).encode())
    return digest.hexdigest()


def _digest_metadata(metadata: dict[str, str]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(metadata, sort_keys=True).encode())


def read_ledger(path: Path) -> list[LedgerRow]:
    """All rows in the table's order.

    Raises:
        CapstanError: missing, or not a ledger.
        DamagedError: not what was written. It is set aside, so that the next `dvc repro` restores it.
    """
    try:
        return read_ledger_part(path)[0]
    except DamagedError:
        raise _refuse(path) from None


def read_ledger_part(path: Path) -> tuple[list[LedgerRow], dict[str, str]]:
    """Rows and the metadata that `write_ledger` stored, verified.

    Raises:
        CapstanError: missing.
        DamagedError: not what was written.
    """
    import pyarrow.parquet as pq

    metadata = read_ledger_metadata(path)
    try:
        rows = [LedgerRow(**row) for row in pq.read_table(path).to_pylist()]
        digest = _digest_rows(rows)
    except Exception as error:  # noqa: BLE001  pyarrow raises several types on damaged bytes, or reads another type
        raise DamagedError(f"{path} is damaged ({error!s:.200})") from error
    if digest != metadata[ROWS]:
        raise DamagedError(f"{path} is damaged: its rows have another digest")
    return rows, metadata


def read_ledger_metadata(path: Path) -> dict[str, str]:
    """What `read_ledger_part` gives second, without reading the rows. Raises as it does."""
    import pyarrow.parquet as pq

    if not path.exists():
        raise CapstanError(f"{path} is missing. Run `dvc repro download`.")
    try:
        metadata = {k.decode(): v.decode() for k, v in (pq.read_schema(path).metadata or {}).items()}
        seal = metadata.pop(SEAL)
    except Exception as error:  # noqa: BLE001  pyarrow raises several types on damaged bytes
        raise DamagedError(f"{path} is damaged ({error!s:.200})") from error
    if seal != _digest_metadata(metadata):
        raise DamagedError(f"{path} is damaged: its metadata have another digest")
    return metadata


def verify_shards(folder: Path, names: Iterable[str]) -> None:
    """Compares shards with the digests in the ledger beside them (9 GB/s); to be called before they are read.

    Args:
        names: shards without `.tar`.

    Raises:
        CapstanError: a shard or the ledger is missing.
        DamagedError: one has other bytes than were written. It is set aside, so that the next `dvc repro` restores it.
    """
    digests = _recorded_digests(folder)
    for name in sorted(set(names)):
        path = folder / f"{name}.tar"
        if not path.exists():
            raise CapstanError(f"{path} is missing: run `dvc repro download`, or `dvc pull {folder}`")
        if storage.digest_file(path) != digests.get(name):
            raise _refuse(path)


def shard_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The digests that the ledger gives for these shards. Raises as `verify_shards` does for the ledger."""
    digests = _recorded_digests(folder)
    return {name: digests[name] for name in names}


def _recorded_digests(folder: Path) -> dict[str, str]:
    ledger = folder / paths.LEDGER.name
    try:
        digests: dict[str, str] = json.loads(read_ledger_metadata(ledger).get(TARS, "{}"))
    except DamagedError:
        raise _refuse(ledger) from None
    return digests


def _refuse(path: Path) -> DamagedError:
    aside = storage.set_aside(path)
    return DamagedError(f"{path} has other bytes than were written (kept as {aside}). Run `dvc repro` again.")


def digest_bytes(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


class ShardWriter:
    """Writes samples in key order into an open tar file."""

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)
        self._last_key = ""

    def add(self, key: str, jpeg: bytes, record: dict[str, Any]) -> None:
        """Adds `<key>.jpg` and `<key>.json`; keys must come in sorted order."""
        assert key > self._last_key, f"{key} after {self._last_key}: keys are written in order"
        self._last_key = key
        self._add(f"{key}.jpg", jpeg)
        self._add(f"{key}.json", json.dumps(record, sort_keys=True, ensure_ascii=False).encode())

    def _add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)  # TarInfo's own defaults: time 0, uid and gid 0, no names
        info.size, info.mode = len(data), 0o644
        self._tar.addfile(info, io.BytesIO(data))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()


def iterate_shard(path: Path) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Samples of a shard in key order: (key, JPEG bytes, record).

    The record has image_id, source, split, url, width, height. Captions are not in it: they stand in the ledger.

    Raises:
        CapstanError: the tar is truncated (also between two members) or not one of ours.
    """
    try:
        _check_end(path)
        with tarfile.open(path, "r:") as tar:
            pending: tuple[str, bytes] | None = None
            for info in tar:
                stream = tar.extractfile(info)
                if stream is None or not info.isfile():
                    raise tarfile.TarError(f"{info.name} is not a file")
                data = stream.read()
                key, _, kind = info.name.partition(".")
                if len(data) != info.size or (kind == "jpg") == (pending is not None):
                    raise tarfile.TarError(f"{info.name} is incomplete or out of place")
                if kind == "jpg":
                    pending = key, data
                    continue
                if kind != "json" or pending is None or pending[0] != key:
                    raise tarfile.TarError(f"{info.name} does not belong here")
                jpeg, pending = pending[1], None
                yield key, jpeg, json.loads(data)
            if pending is not None:
                raise tarfile.TarError(f"{pending[0]}.json is missing")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if isinstance(error, CapstanError):
            raise
        raise CapstanError(f"{path} is missing or damaged ({error}). Run `dvc repro download`.") from error


def _check_end(path: Path) -> None:
    """A tar ends in two zero blocks and fills whole records; tarfile accepts one that was cut between members."""
    size = path.stat().st_size
    if size == 0 or size % tarfile.RECORDSIZE:
        raise tarfile.TarError("truncated: not a whole number of records")
    with path.open("rb") as file:
        file.seek(size - 2 * tarfile.BLOCKSIZE)
        if file.read() != bytes(2 * tarfile.BLOCKSIZE):
            raise tarfile.TarError("truncated: no end mark")


def scan_shard(path: Path, rows: Sequence[LedgerRow]) -> None:
    """Reads a whole shard and compares it with its ledger rows: count, order, identity and digest of each sample.

    Raises:
        CapstanError: any difference; names the shard and the first sample that differs.
    """
    expected = [row for row in rows if row.status == SUCCESS]
    count = 0
    for key, jpeg, record in iterate_shard(path):
        if count == len(expected):
            raise CapstanError(f"{path} holds {key}, which its ledger does not list")
        row = expected[count]
        found = key, record.get("image_id"), digest_bytes(jpeg)
        if found != (row.key, row.image_id, row.digest):
            raise CapstanError(f"{path} holds {found}, its ledger says {(row.key, row.image_id, row.digest)}")
        count += 1
    if count != len(expected):
        raise CapstanError(f"{path} holds {count} samples, its ledger lists {len(expected)}")


def summarise(rows: Sequence[LedgerRow]) -> list[str]:
    """Lines for the screen: totals for each source, and failures by reason."""
    lines = []
    for source in dict.fromkeys(row.source for row in rows):
        own = [row for row in rows if row.source == source]
        splits = Counter(row.split for row in own if row.status == SUCCESS)
        stored = ", ".join(f"{split} {splits[split]}" for split in ("train", "val", "test"))
        lines.append(f"{source}: {sum(splits.values())} of {len(own)} images stored ({stored})")
    failures = Counter((row.status, row.reason) for row in rows if row.status != SUCCESS)
    for (status, reason), count in sorted(failures.items(), key=lambda item: (-item[1], item[0])):
        lines.append(f"  {count} failed: {reason} ({status})")
    total = sum(failures.values())
    lines.append(f"total: {len(rows) - total} stored, {total} failed ({100 * total / max(len(rows), 1):.2f} %)")
    return lines
