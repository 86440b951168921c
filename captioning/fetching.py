"""img2dataset, made robust: bounded in bytes and time, failures sorted into permanent and transient, bounded retries.

img2dataset 1.47 on its own waits for ever on an endless body, never retries by kind of failure, and starts a pool and a
logger process for each call. Here it runs inside one worker process (`captioning.shard_builder` starts those): urllib's
opener, through which it fetches, is replaced by one with limits, its pool by a loop, its logger by nothing. Its bytes
are stored as they came; decoding is ours (`captioning.images`), because its decoder is not careful with EXIF, CMYK,
16 bits and bombs.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from captioning.bounded_http import bounded_opener
from captioning.shards import PERMANENT, TRANSIENT

BACKOFF_S = 2.0
"""Before the first retry round; doubles with each."""
MAX_BACKOFF_S = 60.0

_TRANSIENT_CODES = {408, 425, 429}
_PATTERNS: tuple[tuple[str, str, str], ...] = (
    (r"larger than", PERMANENT, "too large"),
    (r"X-Robots-Tag", PERMANENT, "use disallowed by X-Robots-Tag"),
    (r"infinite loop|redirection", PERMANENT, "redirect loop"),
    (r"Errno -3|Temporary failure in name", TRANSIENT, "name server failed"),
    (r"Errno -[25]\b|Name or service not known|No address associated|nodename nor", PERMANENT, "unknown host"),
    (r"Errno 2\]|No such file|not exists|Errno 21\]", PERMANENT, "no such file"),
    (r"Errno 13\]", PERMANENT, "file not readable"),
    (r"unknown url type|no host given|nonnumeric port|control char|codec can't|invalid", PERMANENT, "bad address"),
    (r"CERTIFICATE_VERIFY_FAILED|certificate verify", PERMANENT, "certificate not valid"),
    (r"timed out", TRANSIENT, "timeout"),
    (r"reset by peer|Errno 104|Broken pipe", TRANSIENT, "connection reset"),
    (r"refused", TRANSIENT, "connection refused"),
    (r"IncompleteRead|incomplete body|Remote end closed|without response", TRANSIENT, "connection broke off"),
)


def classify(message: str) -> tuple[str, str]:
    """(status, reason) of img2dataset's error text. What is not known to be permanent is worth another try."""
    if code := re.match(r"HTTP Error (\d{3})", message):
        if "infinite loop" in message:
            return PERMANENT, "redirect loop"
        number = int(code[1])
        again = number in _TRANSIENT_CODES or number >= 500
        return (TRANSIENT if again else PERMANENT), f"HTTP {number}"
    for pattern, status, reason in _PATTERNS:
        if re.search(pattern, message):
            return status, reason
    return TRANSIENT, "network error"


class _NoLogger:
    """Stands in for img2dataset's logger process, which costs seconds to start and prints what nobody reads."""

    def __init__(self, *args: object) -> None:
        self.done_shards: set[int] = set()

    def start(self) -> None: ...
    def join(self) -> None: ...
    def terminate(self) -> None: ...


def _in_this_process(_: int, downloader: Callable[[Any], Any], reader: Any, *__: object) -> None:
    """A distributor for img2dataset: threads within this process do, as all waiting is for the network."""
    for shard in reader:
        downloader(shard)


@contextmanager
def _limited_img2dataset(max_bytes: int, heartbeat: Callable[[], None]) -> Iterator[Any]:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it asks PyPI for its newest version on import
    img2dataset: Any = import_module("img2dataset.main")  # the package hides it behind the function `main`
    before = img2dataset.LoggerProcess, img2dataset.multiprocessing_distributor
    interrupt = signal.getsignal(signal.SIGINT)  # img2dataset puts its own in place and leaves it
    img2dataset.LoggerProcess, img2dataset.multiprocessing_distributor = _NoLogger, _in_this_process
    urllib.request.install_opener(bounded_opener(max_bytes, heartbeat))
    try:
        yield img2dataset
    finally:
        signal.signal(signal.SIGINT, interrupt)
        img2dataset.LoggerProcess, img2dataset.multiprocessing_distributor = before
        urllib.request.install_opener(None)  # type: ignore[arg-type]  # the default is made anew when needed


@dataclass(frozen=True, slots=True)
class Fetched:
    """Where the bytes of one address lie, or why there are none."""

    tar: Path | None
    offset: int
    num_bytes: int
    status: str
    reason: str

    def read(self) -> bytes:
        assert self.tar is not None
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.num_bytes)


def fetch_round(
    urls: Sequence[str], folder: Path, timeout_s: float, num_threads: int, max_bytes: int, heartbeat: Callable[[], None]
) -> list[Fetched]:
    """One run of img2dataset over `urls`; the result has their order.

    What counts is what lies in the tar: an address that neither the tar nor img2dataset's own list of failures explains
    (it was interrupted, or gave up on its shard) is a transient failure.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.rmtree(folder, ignore_errors=True)  # img2dataset takes what it finds for finished
    folder.mkdir(parents=True)
    table = folder / "urls.parquet"
    pq.write_table(pa.table({"url": list(urls)}), table)
    with _limited_img2dataset(max_bytes, heartbeat) as img2dataset:
        img2dataset.download(
            url_list=str(table),
            output_folder=str(folder / "raw"),
            input_format="parquet",
            output_format="webdataset",
            number_sample_per_shard=max(len(urls), 2),
            thread_count=num_threads,
            timeout=timeout_s,
            disable_all_reencoding=True,
            extract_exif=False,
            compute_hash=None,
            enable_wandb=False,
            max_shard_retry=0,
        )
    return _collect(len(urls), folder / "raw")


def _collect(num_urls: int, folder: Path) -> list[Fetched]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    outcomes = [Fetched(None, 0, 0, TRANSIENT, "img2dataset gave up") for _ in range(num_urls)]
    for listing in folder.glob("*.parquet"):
        try:
            for row in pq.read_table(listing, columns=["key", "error_message"]).to_pylist():
                if row["error_message"]:
                    outcomes[int(row["key"])] = Fetched(None, 0, 0, *classify(row["error_message"]))
        except (pa.ArrowException, OSError):
            pass  # cut short: what it would have said stays "gave up"
    for tar in folder.glob("*.tar"):
        size = tar.stat().st_size
        try:
            with tarfile.open(tar, "r:") as members:
                for info in members:
                    if info.name.endswith(".jpg") and info.offset_data + info.size <= size:
                        key = int(info.name.removesuffix(".jpg"))
                        outcomes[key] = Fetched(tar, info.offset_data, info.size, "", "")
        except (tarfile.TarError, OSError):
            pass  # cut short: the members before the cut count
    return outcomes


def fetch(
    urls: Sequence[str],
    folder: Path,
    *,
    timeout_s: float,
    num_threads: int,
    num_retries: int,
    max_bytes: int,
    heartbeat: Callable[[], None] = lambda: None,
) -> list[Fetched]:
    """Fetches all addresses; transient failures again, in at most `num_retries` more rounds with growing pauses.

    Args:
        urls: http, https or file addresses.
        folder: emptied first; holds the raw tars, one for each round.
        timeout_s: for one address and each of its redirects, from connection to last byte.
        max_bytes: a longer body is a permanent failure.
        heartbeat: called from any thread at each sign of life.

    Returns:
        What became of each address, in their order.
    """
    shutil.rmtree(folder, ignore_errors=True)
    outcomes = [Fetched(None, 0, 0, TRANSIENT, "not tried") for _ in urls]
    pending = list(range(len(urls)))
    for round_number in range(num_retries + 1):
        if not pending:
            break
        if round_number:
            _pause(min(BACKOFF_S * 2 ** (round_number - 1), MAX_BACKOFF_S), heartbeat)
        results = fetch_round(
            [urls[i] for i in pending], folder / str(round_number), timeout_s, num_threads, max_bytes, heartbeat
        )
        for i, outcome in zip(pending, results, strict=True):
            outcomes[i] = outcome
        pending = [i for i in pending if outcomes[i].status == TRANSIENT]
    return outcomes


def _pause(seconds: float, heartbeat: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        heartbeat()
        time.sleep(min(left, 1.0))
