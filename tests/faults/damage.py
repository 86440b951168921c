"""Damage to files: bits, lengths, pages, whole files; and which files of a work folder to damage."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

PAGE = 4096
KINDS = ("flip", "cut to 0", "cut to 1", "cut to half", "cut by 1", "zeroed page", "deleted")


def flip_bit(content: bytes, bit: int) -> bytes:
    """The same bytes but for one bit."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def damaged(content: bytes, kind: str, draw: random.Random) -> bytes:
    """Content after damage of a kind; it differs from `content` unless that is empty."""
    if kind == "flip":
        return flip_bit(content, draw.randrange(8 * len(content))) if content else b""
    if kind == "zeroed page":
        used = [start for start in range(0, len(content), PAGE) if any(content[start : start + PAGE])]
        start = draw.choice(used) if used else 0
        return content[:start] + bytes(len(content[start : start + PAGE])) + content[start + PAGE :]
    return content[: {"cut to 0": 0, "cut to 1": 1, "cut to half": len(content) // 2, "cut by 1": -1}[kind]]


def damage_file(path: Path, kind: str, draw: random.Random) -> None:
    """Replaces the file: whatever shares its inode keeps its bytes."""
    if kind == "deleted":
        path.unlink()
        return
    content = damaged(path.read_bytes(), kind, draw)
    path.unlink()
    path.write_bytes(content)


def units(work: Path) -> list[list[Path]]:
    """Committed pieces of a stage's work, the newest first: a checkpoint's files, a shard and its part, other files."""
    checkpoints = [p for p in work.rglob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    if checkpoints:
        checkpoints.sort(key=lambda p: p.name, reverse=True)
        return [sorted(p for p in folder.iterdir() if p.is_file()) for folder in checkpoints]
    parts = [p for pattern in ("parts/*.parquet", "parts/*.jsonl", "*.h5") for p in work.glob(f"*/{pattern}")]
    parts = [p for p in parts if not p.name.startswith(".")]
    parts.sort(key=lambda p: p.stat().st_mtime_ns, reverse=True)
    return [[part, *work.glob(f"*/shards/{part.stem}.tar")] for part in parts]


def damage_work(work: Path, which: str, kind: str, draw: random.Random) -> list[Path]:
    """Damages one file of the newest piece, of the newest two, or of all; or swaps a file of the newest two pieces.

    Returns:
        The files that are damaged now; none where there was no work yet.
    """
    found = units(work)
    if which == "swapped":
        return _swap(found, draw)
    chosen = [draw.choice(piece) for piece in found[: {"newest": 1, "newest two": 2, "all": len(found)}[which]]]
    for path in chosen:
        damage_file(path, kind, draw)
    return chosen


def _swap(found: list[list[Path]], draw: random.Random) -> list[Path]:
    if len(found) < 2:
        return []
    first = draw.choice(found[0])
    in_checkpoint = first.parent.name.startswith("step-")
    twins = [p for p in found[1] if (p.name == first.name if in_checkpoint else p.suffix == first.suffix)]
    if not twins or twins[0].read_bytes() == first.read_bytes():
        return []
    aside = first.with_name("aside")
    for source, target in ((first, aside), (twins[0], first), (aside, twins[0])):
        shutil.move(source, target)
    return [first, twins[0]]
