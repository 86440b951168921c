"""Health records on disk: JSON lines that many processes may append to, that stay small, and that a kill cannot spoil.

Only plumbing: what stands here changes no result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
ALERTS = "alerts.jsonl"


def samples_path(folder: Path, stage: str) -> Path:
    return folder / f"{stage.replace('/', '_')}.jsonl"


def append(path: Path, record: Record, fresh: bool = False) -> None:
    """Adds one line in one write, so lines of several processes do not mix.

    Args:
        fresh: begin on a new line, whatever stands before: the last writer may have run out of disk within a line.

    Raises:
        OSError: a full disk, say.
    """
    line = ("\n" if fresh else "") + json.dumps(record, separators=(",", ":")) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read(path: Path) -> list[Record]:
    """All whole records of a file; lines that are cut off or damaged are left out, and no file is no records."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    return [record for line in lines if (record := _parse(line)) is not None]


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def bound(path: Path, max_bytes: int, thin: Callable[[list[Record]], list[Record]]) -> None:
    """Rewrites a file that has grown beyond `max_bytes` with what `thin` leaves.

    A line that another process appends meanwhile may be lost: that costs one sample, a lock would cost every one.
    """
    if not path.exists() or path.stat().st_size <= max_bytes:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    lines = [json.dumps(record, separators=(",", ":")) for record in thin(read(path))]
    temporary.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    temporary.replace(path)


def every_other_sample(records: list[Record]) -> list[Record]:
    """Half of the samples, from the whole time, and the beginnings and ends of the runs that they belong to.

    Samples carry running totals, so what is left still adds up.
    """
    samples = [record for record in records if record.get("kind") == "sample"][::2]
    kept, runs = set(map(id, samples)), {str(record.get("run")) for record in samples}
    return [r for r in records if id(r) in kept or (r.get("kind") != "sample" and str(r.get("run")) in runs)]


def newer_half(records: list[Record]) -> list[Record]:
    return records[len(records) // 2 :]
