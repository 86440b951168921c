"""Files that are whole or absent: digests, atomic writes, and work that is published by one rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from captioning import paths
from captioning.errors import CapstanError

CHUNK = 1 << 22


def digest_file(path: Path) -> str:
    """xxh3-128 of a file's bytes, in hex (about 9 GB/s, RECOVERY.md)."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_tree(path: Path) -> str:
    """xxh3-128 over names and contents of a file or a directory, in sorted order."""
    if path.is_file():
        return digest_file(path)
    digest = xxhash.xxh3_128()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{digest_file(file)}\n".encode())
    return digest.hexdigest()


def fingerprint(stage: str, params: Any, inputs: list[Path], packages: list[str] | None = None) -> str:
    """A name for work in progress: changed params, inputs or libraries never find each other's work.

    Args:
        params: anything JSON can write; the stage's resolved params.
        inputs: files and directories whose contents matter.
        packages: distributions whose versions matter.
    """
    versions = {name: version(name) for name in packages or []}
    inputs_digests = {str(path): digest_tree(path) for path in inputs}
    text = json.dumps([stage, params, inputs_digests, versions], sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode())[:16]


def work_folder(stage: str, name: str) -> Path:
    """`.work/<stage>/<name>`, made if needed; it survives a killed run (and DVC, which deletes outs)."""
    folder = paths.work_root() / stage / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yields a temporary path; what is written there becomes `target` whole, or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, target)
        _fsync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(target: Path, value: Any, indent: int | None = 1) -> None:
    """Writes JSON atomically, keys in the order given, ending with a newline."""
    with atomic_write(target) as temporary:
        temporary.write_text(json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def read_json(path: Path) -> Any:
    """Parses a JSON file.

    Raises:
        CapstanError: the file is not JSON; names it.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CapstanError(f"{path} is not valid JSON ({error}). Remake it or fetch it again.") from error


def publish(built: Path, target: Path) -> None:
    """Moves a finished directory or file into place with one rename, after its bytes are on disk."""
    for file in [built] if built.is_file() else sorted(p for p in built.rglob("*")):
        _fsync(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    if built.is_dir():
        _fsync(built)
        if target.exists():
            shutil.rmtree(target)
    try:
        os.replace(built, target)
    except OSError as error:
        if error.errno != 18:  # EXDEV: `dvc exp run --temp` may run on another filesystem
            raise
        staged = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(staged, ignore_errors=True)
        (shutil.copytree if built.is_dir() else shutil.copy2)(built, staged)
        os.replace(staged, target)
        shutil.rmtree(built) if built.is_dir() else built.unlink()
    _fsync(target.parent)


def discard_work(stage: str, name: str) -> None:
    """Forgets a work folder once its result is published."""
    shutil.rmtree(paths.work_root() / stage / name, ignore_errors=True)
