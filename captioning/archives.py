"""Archives: fetched with resume and checksum, or taken from a local folder; read without trusting what is in them."""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import unquote, urlsplit

from captioning import storage
from captioning.errors import CapstanError
from captioning.source_params import Archive
from captioning.transfer import download
from captioning.work import open_work

MAX_TEXT_BYTES = 4 << 30
MAX_MEMBER_BYTES = 256 << 20
"""No photograph is larger; a member that says so is not one."""
DISK_RESERVE_BYTES = 1 << 30
NOTE = "digests of extracted files"

_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    OSError,
)


def file_name(archive: Archive) -> str:
    """The last component of the archive's URL: its name in `root` and among the downloads."""
    name = PurePosixPath(unquote(urlsplit(archive.url).path)).name
    if not name or name in (".", ".."):
        raise CapstanError(f"{archive.url} does not end in a file name")
    return name


def locate(archive: Archive, root: Path | None) -> Path:
    """The archive's file, or the folder that holds its unpacked members.

    Args:
        root: where the user keeps the archives or their unpacked files; None downloads to the work folder.

    Raises:
        CapstanError: `root` does not exist; the download fails; the pinned checksum does not match.
    """
    name = file_name(archive)
    if root is None:
        return fetch_once(archive.url, name, archive.sha256)
    if not root.is_dir():
        raise CapstanError(f"root {root} is not a folder: put {name} (from {archive.url}) there, or set root to null")
    path = root / name
    if not path.is_file():
        return root
    if archive.sha256 is not None and (found := storage.sha256_file(path)) != archive.sha256.lower():
        raise CapstanError(
            f"{path} has sha256 {found}, but params.yaml pins {archive.sha256}. Put the right file there, or correct "
            "the pin if you trust this one."
        )
    return path


def fetch_once(url: str, name: str, sha256: str | None) -> Path:
    """Downloads to where all settings share it; of two processes that want the same file, one waits for the other.

    Raises:
        CapstanError: as `captioning.transfer.download`.
    """
    with open_work("archives", hashlib.sha256(url.encode()).hexdigest()[:12], about=url) as work:
        return download(url, work.folder / name, sha256)


def read_text(path: Path, name: str) -> str:
    """The UTF-8 text of the file `name` from an archive, from a folder, or from `path` itself if it is no archive.

    Raises:
        CapstanError: not there, damaged, or not UTF-8.
    """
    try:
        return _read_bytes(path, name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CapstanError(f"{name} in {path} is not UTF-8 text: {error}") from None


def _read_bytes(path: Path, name: str) -> bytes:
    if path.is_dir():
        found = sorted(path.rglob(name))
        if not found:
            raise CapstanError(f"{path} holds no {name}: put it there, or the archive that contains it")
        return found[0].read_bytes()
    if not (zipfile.is_zipfile(path) or path.name.endswith((".zip", ".tar", ".tar.gz", ".tgz"))):
        return path.read_bytes()
    with _damage_named(path):
        for member, stream in _members(path, {name}, MAX_TEXT_BYTES):
            if member == name:
                return stream.read(MAX_TEXT_BYTES)
    raise CapstanError(f"{path} holds no {name}: is it the right archive?")


def image_folder(archive: Archive, root: Path | None, wanted: set[str], folder: Path) -> Path:
    """A folder in which the wanted images lie flat, by name: the user's own, or extracted into `folder`.

    Images that the archive lacks are simply not there: they become failed rows.

    Raises:
        CapstanError: no image found at all, or the archive is damaged or unsafe.
    """
    path = locate(archive, root)
    if path.is_file():
        target = folder / f"{file_name(archive)}-{storage.digest_file(path)[:12]}-{_names_digest(wanted)}"
        if not _is_whole(target):
            extract(path, wanted, target)
        return target
    for candidate in _folders(path):
        if any((candidate / name).is_file() for name in wanted):
            return candidate
    raise CapstanError(f"{path} holds neither {file_name(archive)} nor a folder with its images: put one there")


def _names_digest(names: set[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:8]


def _folders(root: Path) -> Iterator[Path]:
    """`root` and the folders two levels below it."""
    yield root
    for pattern in ("*", "*/*"):
        yield from (path for path in sorted(root.glob(pattern)) if path.is_dir())


def _note(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.jsonl")


def _is_whole(folder: Path) -> bool:
    """Whether an earlier run extracted this folder and every file still has its digest; a damaged one is set aside."""
    if not folder.exists():
        return False
    digests = storage.read_part(_note(folder), NOTE)
    if digests == [[path.name, storage.digest_file(path)] for path in sorted(folder.iterdir())]:
        return True
    storage.set_aside(folder)
    return False


def extract(path: Path, wanted: set[str], target: Path) -> int:
    """Extracts the members whose last path component is wanted, flat, into `target` (whole or absent).

    Their digests stand in `<target>.jsonl`.

    Returns:
        The number of files extracted.

    Raises:
        CapstanError: a member that would land outside of the folder, a link, a member that is too large for an image,
            too little disk, or a damaged archive.
    """
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    count = 0
    with _damage_named(path):
        for name, stream in _members(path, wanted, MAX_MEMBER_BYTES):
            with (partial / name).open("wb") as file:
                shutil.copyfileobj(stream, file, storage.CHUNK)
            count += 1
    if count == 0:
        raise CapstanError(f"{path} holds none of the {len(wanted)} images that the captions name: a wrong file?")
    digests = [[file.name, storage.digest_file(file)] for file in sorted(partial.iterdir())]
    storage.write_part(_note(target), digests, NOTE)
    os.replace(partial, target)
    return count


def _members(path: Path, wanted: set[str], max_bytes: int) -> Iterator[tuple[str, IO[bytes]]]:
    """(last path component, stream) of the wanted members, after the whole archive's names are found safe."""
    if zipfile.is_zipfile(path):
        yield from _zip_members(path, wanted, max_bytes)
    elif path.suffix == ".zip":
        raise zipfile.BadZipFile("no directory at its end: truncated, or not a zip")
    else:
        yield from _tar_members(path, wanted, max_bytes)


def _zip_members(path: Path, wanted: set[str], max_bytes: int) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(path) as archive:
        chosen = []
        for info in archive.infolist():
            is_link = (info.external_attr >> 16) & 0o170000 == 0o120000
            name = _safe_name(path, info.filename, is_link)
            if name in wanted and not info.is_dir():
                _check_size(path, info.filename, info.file_size, max_bytes)
                chosen.append((name, info))
        _check_disk(path, sum(info.file_size for _, info in chosen))
        for name, info in chosen:
            with archive.open(info) as stream:
                yield name, stream


def _tar_members(path: Path, wanted: set[str], max_bytes: int) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(path, "r:*") as archive:  # one pass: going back in a compressed tar unpacks it again
        for info in archive:
            name = _safe_name(path, info.name, info.issym() or info.islnk())
            if name in wanted and info.isfile():
                _check_size(path, info.name, info.size, max_bytes)
                _check_disk(path, info.size)
                stream = archive.extractfile(info)
                assert stream is not None
                yield name, stream
        if isinstance(archive.fileobj, io.BufferedReader):  # compressed ones have an end mark of their own
            # tarfile takes a tar that is cut between two members for complete; a whole one ends in zeros.
            archive.fileobj.seek(-tarfile.BLOCKSIZE, os.SEEK_END)
            if archive.fileobj.read() != bytes(tarfile.BLOCKSIZE):
                raise EOFError("it ends in the middle")


def _safe_name(path: Path, member: str, is_link: bool) -> str:
    parts = member.replace("\\", "/").split("/")
    if ".." in parts or member.startswith(("/", "\\")) or (len(member) > 1 and member[1] == ":") or "\0" in member:
        raise CapstanError(f"{path} is refused: its entry {member!r} would land outside of the folder")
    if is_link:
        raise CapstanError(f"{path} is refused: its entry {member!r} is a link")
    return parts[-1]


def _check_size(path: Path, member: str, num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise CapstanError(f"{path} is refused: {member} says it unpacks to {num_bytes:,} bytes (limit {max_bytes:,})")


def _check_disk(path: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(".").free
    if num_bytes + DISK_RESERVE_BYTES > free:
        raise CapstanError(f"unpacking {path} needs {num_bytes:,} bytes and some reserve; the disk has {free:,} free")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the archive's
        raise CapstanError(
            f"{path} is damaged ({type(error).__name__}: {error}). Delete it, and fetch it again."
        ) from error
