"""Files that are whole or absent, and known to be unchanged: digests, atomic writes, committed folders, parts."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from mmap import mmap
from pathlib import Path
from typing import Any

import xxhash

from captioning.errors import CapstanError, DamagedError

CHUNK = 1 << 22
MANIFEST = "manifest.json"
SEAL = b"\ncapstan-xxh3-128 "


def digest_file(path: Path) -> str:
    """xxh3-128 of a file's bytes, in hex (about 9 GB/s). Raises DamagedError: the disk cannot read it."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file, _bad_sectors_are_damage(path):
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex: where others name files by it (pins, hubs). `digest_file` is for our own."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _bad_sectors_are_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise DamagedError(f"{path} is damaged: the disk cannot read it") from error


def digest_tree(path: Path) -> str:
    """xxh3-128 over names and contents of a file or a directory, in sorted order."""
    if path.is_file():
        return digest_file(path)
    digest = xxhash.xxh3_128()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{digest_file(file)}\n".encode())
    return digest.hexdigest()


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
    # One writer a target, so a killed one's leftover is replaced; but a rank may outlive its main process by a moment.
    rank = os.environ.get("RANK", "0")
    temporary = target.with_name(f".{target.name}{'' if rank == '0' else f'.{os.getpid()}'}.tmp")
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
        temporary.write_bytes(dump_json(value, indent))


def dump_json(value: Any, indent: int | None = 1) -> bytes:
    """JSON as all our files have it. Raises ValueError: a number that is not finite."""
    return (json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Parses a JSON file.

    Raises:
        CapstanError: the file is not JSON; names it.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CapstanError(f"{path} is not valid JSON ({error}). Remake it or fetch it again.") from error


@dataclass(frozen=True)
class Commit:
    """A folder under construction: every file passes through `write`, which keeps its size and digest."""

    folder: Path
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, name: str, content: bytes | memoryview | mmap) -> None:
        """Writes one file and fsyncs it. The digest is of the memory, so a bad write is found by the next `verify`."""
        with (self.folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.files[name] = {"num_bytes": len(content), "digest": xxhash.xxh3_128_hexdigest(content)}


@contextmanager
def commit(target: Path, about: dict[str, Any]) -> Iterator[Commit]:
    """A folder that appears whole, with a manifest by which `verify` finds any change; there is one writer at a time.

    Files are on disk before the manifest, the manifest before the rename, the rename before this returns.

    Args:
        about: what the manifest says besides; anything JSON can write.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    remove(temporary)
    temporary.mkdir()
    try:
        work = Commit(temporary)
        yield work
        content = {"about": about, "files": work.files}
        sealed = {**content, "digest": _seal(content)}
        with (temporary / MANIFEST).open("w") as file:
            file.write(json.dumps(sealed, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        _fsync(temporary)
        old = target.with_name(f".{target.name}.old.tmp")
        remove(old)
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
        _fsync(target.parent)
        remove(old)
    except BaseException:
        remove(temporary)
        raise


def _seal(content: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a committed folder: `about`, `files` with their sizes and digests, and a `digest` of all that.

    Raises:
        DamagedError: there is none, or it is damaged.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text("utf-8"))
        if found["digest"] == _seal({"about": found["about"], "files": found["files"]}):
            return dict(found)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        pass
    raise DamagedError(f"{folder}: {MANIFEST} is missing or damaged")


def read_committed(folder: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """A file's bytes, verified: what is returned is what was committed.

    Raises:
        DamagedError: the file is missing or has other bytes.
    """
    expected = manifest["files"].get(name)
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise DamagedError(f"{folder / name} cannot be read ({error.strerror})") from error
    if expected is None or xxhash.xxh3_128_hexdigest(content) != expected["digest"]:
        raise DamagedError(f"{folder / name} is damaged: its bytes have another digest")
    return content


def verify(folder: Path) -> int:
    """Compares every file of a committed folder with the manifest, and returns the number of bytes.

    Raises:
        DamagedError: names what is missing, damaged or too much.
    """
    manifest = read_manifest(folder)
    strays = {path.name for path in folder.iterdir()} - set(manifest["files"]) - {MANIFEST}
    if strays:
        raise DamagedError(f"{folder} holds {min(strays)}, which was not committed with it")
    return sum(len(read_committed(folder, name, manifest)) for name in manifest["files"])


def seal(path: Path) -> None:
    """Appends the digest of a file's bytes to it, for formats that read no further than their own end, as HDF5 does."""
    digest = bytes.fromhex(digest_file(path))
    with path.open("ab") as file:
        file.write(SEAL + digest)


def check_seal(path: Path) -> None:
    """Compares a sealed file's bytes with its digest, before a library that trusts them may loop or crash on them.

    Raises:
        DamagedError: other bytes than were sealed, or no seal.
    """
    with path.open("rb") as file, _bad_sectors_are_damage(path):
        end = file.seek(0, os.SEEK_END) - len(SEAL) - 16
        file.seek(max(end, 0))
        footer = file.read()
        file.seek(0)
        digest, left = xxhash.xxh3_128(), end
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
    if end < 0 or footer != SEAL + digest.digest():
        raise DamagedError(f"{path} is damaged: its bytes have another digest")


def write_part(target: Path, rows: Iterable[Any], about: Any) -> None:
    """Finished items, one JSON value a line, and a last line with the digest of all before it."""
    lines = [json.dumps({"about": about}), *(json.dumps(row, ensure_ascii=False) for row in rows)]
    body = "".join(f"{line}\n" for line in lines).encode()
    with atomic_write(target) as temporary:
        temporary.write_bytes(body + f"{xxhash.xxh3_128_hexdigest(body)}\n".encode())


def read_part(path: Path, about: Any) -> list[Any] | None:
    """What `write_part` wrote; None where there is nothing, or what is there is of something else.

    A damaged part is set aside and named.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError:  # a bad sector
        content = b""
    body, digest = content[:-33], content[-33:]
    if digest != f"{xxhash.xxh3_128_hexdigest(body)}\n".encode():
        set_aside(path)
        return None
    first, *rows = [json.loads(line) for line in body.splitlines()]
    return rows if first == {"about": json.loads(json.dumps(about))} else None


def move(source: Path, target: Path) -> None:
    """Renames a finished file into place, on the same filesystem, after its bytes are on disk."""
    _fsync(source)
    os.replace(source, target)
    _fsync(target.parent)


def set_aside(path: Path, folder: Path | None = None, say: bool = True) -> Path:
    """Renames a damaged file or folder to `<name>.corrupt`, and says so; it is never used again.

    Args:
        folder: where to, on the same filesystem; None: beside it.
        say: False where the caller says more.
    """
    aside = (folder or path.parent) / f"{path.name}.corrupt"
    aside.parent.mkdir(exist_ok=True)
    remove(aside)
    # Hard links to DVC's cache, maybe: DVC takes a read-only file there for whole without looking.
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        file.chmod(0o644)
    os.replace(path, aside)
    if say:
        print(f"{path} was damaged: set aside as {aside if folder else aside.name}, made anew", flush=True)
    return aside


def remove(path: Path) -> None:
    """Deletes a file or a whole folder; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def publish(built: Path, target: Path, names: Sequence[str] | None = None) -> None:
    """Gives `target` the content of `built` with one rename, after its bytes are on disk.

    `built` stays: where a kill comes before DVC has recorded the stage, DVC deletes the outs and runs it again. Files
    are shared by hard links where the filesystem can, so this costs no space; nobody writes into them any more.

    Args:
        names: of a folder, these files alone; None: all.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.tmp")
    remove(staged)
    if names is not None:
        staged.mkdir()
        for name in names:
            _link(built / name, staged / name)
    elif built.is_dir():
        shutil.copytree(built, staged, copy_function=_link)
    else:
        _link(built, staged)
    for path in [staged] if staged.is_file() else [*sorted(staged.rglob("*")), staged]:
        _fsync(path)
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(staged, target)
    _fsync(target.parent)


def _link(source: Any, target: Any) -> None:
    try:
        os.link(source, target)
    except OSError:  # another filesystem (`dvc exp run --temp`), or one without hard links
        shutil.copy2(source, target)
