"""One large file over HTTP: resumed with Range where the server allows it, checked, then renamed into place."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from captioning import storage
from captioning.errors import CapstanError
from captioning.progress import Progress

TIMEOUT_S = 30.0
NUM_ATTEMPTS = 5
BACKOFF_S = 1.0
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


class _Retry(Exception):
    """The transfer broke off; what has arrived is kept."""


def download(
    url: str,
    target: Path,
    sha256: str | None,
    *,
    max_bytes: int = sys.maxsize,
    by_hand: str = ", or fetch it by hand and set `root` to its folder",
) -> Path:
    """Fetches `url` to `target`, going on where an earlier run stopped.

    `<target>.part` and `<target>.part.json` (the server's validators) survive a kill. A file that is already there is
    checked against the pin, or against the digest noted when it arrived.

    Args:
        sha256: the pin: a digest in hex, or its beginning (8 digits or more).
        max_bytes: a longer file is refused.
        by_hand: ends the error that follows the last attempt.

    Raises:
        CapstanError: the server refuses or stays silent; the digest differs from the pin (the file is set aside); too
            long, or more than the disk holds.
    """
    note = target.with_name(target.name + ".sha256")
    if target.exists() and note.exists():
        if _is_as_noted(target, note, sha256):
            return target
        storage.set_aside(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    # A run may have been killed between the check of a whole file and its renaming.
    if not (part.exists() and note.exists() and _is_as_noted(part, note, sha256)):
        resumed = _size(part) > 0
        _fetch(url, part, max_bytes, by_hand)
        found = storage.sha256_file(part)
        if resumed and sha256 is not None and not _agrees(found, sha256):
            part.unlink()  # a power cut may leave a beginning of other bytes than were written
            _fetch(url, part, max_bytes, by_hand)
            found = storage.sha256_file(part)
        _check_pin(url, part, found, sha256)
        with storage.atomic_write(note) as temporary:
            temporary.write_text(found + "\n", "ascii")
        if sha256 is None:
            print(f"{target.name}: sha256 {found} (not pinned; put it into params.yaml to pin it)", flush=True)
    storage.move(part, target)
    _metadata(part).unlink(missing_ok=True)
    return target


def _is_as_noted(file: Path, note: Path, sha256: str | None) -> bool:
    return storage.sha256_file(file) == note.read_text("ascii").strip() and (
        sha256 is None or note_matches(note, sha256)
    )


def _fetch(url: str, part: Path, max_bytes: int, by_hand: str) -> None:
    """Fetches all of `url` into `part`, in as many transfers as it takes while they move on."""
    attempt = 0
    while True:
        size = _size(part)
        try:
            return _transfer(url, part, max_bytes)
        except (_Retry, TimeoutError, ConnectionError, http.client.HTTPException, urllib.error.URLError) as error:
            attempt = 1 if _size(part) > size else attempt + 1  # a transfer that moves on is not given up
            if attempt == NUM_ATTEMPTS:
                raise CapstanError(
                    f"{url} could not be fetched ({_plain(error)}), {NUM_ATTEMPTS} attempts; run again to go on "
                    f"at byte {_size(part):,}{by_hand}."
                ) from error
            time.sleep(BACKOFF_S * 2 ** (attempt - 1))


def note_matches(note: Path, sha256: str) -> bool:
    return _agrees(note.read_text("ascii").strip(), sha256)


def _agrees(found: str, pin: str) -> bool:
    return len(pin) >= 8 and found.startswith(pin.lower())


def _check_pin(url: str, part: Path, found: str, sha256: str | None) -> None:
    if sha256 is None or _agrees(found, sha256):
        return
    aside = part.with_name(part.name.removesuffix(".part") + ".corrupt")
    os.replace(part, aside)
    _metadata(part).unlink(missing_ok=True)
    raise CapstanError(
        f"{url} gave a file with sha256 {found}, but {sha256} is pinned. It was set aside as {aside}. "
        "Run again if the transfer may have been disturbed; change the pin only if you trust the new file."
    )


def _plain(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    return str(getattr(error, "reason", error)) or type(error).__name__


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _metadata(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _headers(url: str, part: Path) -> dict[str, str]:
    """Asks for the rest, and only of the very file whose beginning is here (If-Range)."""
    headers = {"User-Agent": "capstan", "Accept-Encoding": "identity"}
    try:
        known = json.loads(_metadata(part).read_text("utf-8"))
    except (OSError, ValueError):
        known = {}
    if _size(part) and known.get("url") == url and known.get("validator"):
        headers |= {"Range": f"bytes={_size(part)}-", "If-Range": known["validator"]}
    return headers


def _transfer(url: str, part: Path, max_bytes: int) -> None:
    try:
        request = urllib.request.Request(url, headers=_headers(url, part))
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{_size(part)}":
            return  # nothing is missing: an earlier run was killed after the last byte
        if error.code == 416:  # the file has changed: start over
            part.unlink(missing_ok=True)
            raise _Retry("the server does not have the range that is missing") from error
        if error.code in _TRANSIENT:
            raise
        raise CapstanError(f"{url} answered HTTP {error.code} {error.reason}: is the address right?") from error
    except ValueError as error:
        raise CapstanError(f"{url} is not an address: {error}") from error
    with response:
        _receive(response, part, url, max_bytes)


def _receive(response: http.client.HTTPResponse, part: Path, url: str, max_bytes: int) -> None:
    offset = _size(part) if response.status == 206 else 0
    content_range = response.headers.get("Content-Range", "")
    if response.status == 206 and not content_range.startswith(f"bytes {offset}-"):
        part.unlink(missing_ok=True)
        raise _Retry(f"the server sent {content_range!r}")
    length = response.headers.get("Content-Length")
    total = offset + int(length) if length is not None and length.isdigit() else None
    if total is not None and total > max_bytes:
        raise CapstanError(f"{url} has {total:,} bytes, more than the {max_bytes:,} that are allowed")
    if total is not None and total - offset > shutil.disk_usage(part.parent).free:
        raise CapstanError(f"{url} has {total:,} bytes, more than the disk at {part.parent} has free")
    etag = response.headers.get("ETag", "")
    validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
    if offset == 0:
        part.unlink(missing_ok=True)  # before the new validator stands: old bytes never meet it
        storage.write_json(_metadata(part), {"url": url, "validator": validator})
    with Progress(part.name.removesuffix(".part"), total, "byte", offset) as progress, part.open("ab") as file:
        while chunk := response.read1(storage.CHUNK):
            if progress.count + len(chunk) > max_bytes:  # a body that told no length
                part.unlink()
                raise CapstanError(f"{url} has more than the {max_bytes:,} bytes that are allowed")
            file.write(chunk)
            progress.update(len(chunk))
    if total is not None and _size(part) < total:
        raise _Retry(f"broke off after {_size(part):,} of {total:,} bytes")
