"""Worker processes that build chunks, watched by their parent: one that hangs or dies is replaced."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Lock

from captioning.errors import CapstanError
from captioning.orphans import die_with_parent
from captioning.params import DownloadParams
from captioning.progress import Progress
from captioning.shard_builder import Chunk, build_chunk

NUM_ATTEMPTS = 2
"""A chunk whose worker died or hung is tried once more."""


@dataclass
class _Worker:
    """One process that builds chunks, the pipe to it, and what it is doing."""

    process: BaseProcess
    pipe: Connection
    chunk: Chunk | None = None
    last_sign: float = 0.0
    num_settled: int = 0

    def give(self, chunk: Chunk) -> None:
        self.chunk, self.last_sign, self.num_settled = chunk, time.monotonic(), 0
        self.pipe.send(chunk)

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(0.5 if self.chunk is None else 0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def work(pipe: Connection, download: DownloadParams, log: Path) -> None:
    """A worker process's life: chunks come through the pipe, signs of life and results go back."""
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    with log.open("a") as file:  # img2dataset and its libraries print a lot
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    lock = Lock()

    def send(message: object) -> None:
        with lock:
            pipe.send(message)

    while True:
        try:
            chunk = pipe.recv()
            try:
                build_chunk(chunk, download, send)
                send("done")
            except Exception as error:  # noqa: BLE001  the parent reports it
                import traceback

                traceback.print_exc()
                send(f"{type(error).__name__}: {error}")
        except (EOFError, BrokenPipeError):
            return  # the parent is gone


@contextmanager
def _workers(num: int, download: DownloadParams, log: Path) -> Iterator[list[_Worker]]:
    workers = [_start(download, log) for _ in range(num)]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def _start(download: DownloadParams, log: Path) -> _Worker:
    context = get_context("spawn")  # threads may run here; a fork would copy their locks
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, download, log), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def build_chunks(chunks: Sequence[Chunk], download: DownloadParams, folder: Path, stall_s: float | None = None) -> None:
    """Builds all chunks with `download.num_processes` workers.

    Args:
        stall_s: a worker that gives no sign of life for so long is killed, and its chunk tried once more.

    Raises:
        CapstanError: a chunk's worker died, hung or failed twice.
    """
    stall_s = stall_s or 12 * download.timeout_s + 120  # ten redirects, each with its own timeout
    log = folder / "img2dataset.log"
    waiting = deque(chunks)
    faults: Counter[str] = Counter()
    total = sum(len(chunk.rows) for chunk in chunks)
    num_workers = min(download.num_processes, len(chunks))
    with Progress("download", total, "image") as progress, _workers(num_workers, download, log) as workers:
        while waiting or any(worker.chunk for worker in workers):
            for worker in workers:
                if worker.chunk is None and waiting:
                    with suppress(BrokenPipeError):  # it died idle: its pipe says so below
                        worker.give(waiting.popleft())
            ready = wait([worker.pipe for worker in workers if worker.chunk], timeout=0.5)
            for number, worker in enumerate(workers):
                chunk = worker.chunk
                if chunk is None:
                    continue
                fault = _listen(worker, progress) if worker.pipe in ready else _silence(worker, stall_s)
                if fault is not None:
                    faults[chunk.shard] += 1
                    _report(chunk, fault, faults[chunk.shard], log, progress)
                    progress.update(-worker.num_settled)
                    worker.stop()
                    workers[number] = _start(download, log)
                    waiting.appendleft(chunk)


def _report(chunk: Chunk, fault: str, num_faults: int, log: Path, progress: Progress) -> None:
    if num_faults == NUM_ATTEMPTS:
        raise CapstanError(f"shard {chunk.shard} failed {NUM_ATTEMPTS} times: {fault}. Its log: {log}")
    progress.write(f"shard {chunk.shard}: {fault}; once more")


def _listen(worker: _Worker, progress: Progress) -> str | None:
    """Takes what a worker has sent; a fault's description if it failed."""
    try:
        while worker.pipe.poll():
            message = worker.pipe.recv()
            worker.last_sign = time.monotonic()
            if isinstance(message, int):
                worker.num_settled += message
                progress.update(message)
            elif message == "done":
                worker.chunk = None
            else:
                return str(message)
    except (EOFError, ConnectionError):
        worker.process.join(5)
        return f"its worker died (exit code {worker.process.exitcode})"
    return None


def _silence(worker: _Worker, stall_s: float) -> str | None:
    if time.monotonic() - worker.last_sign > stall_s:
        return f"its worker gave no sign of life for {stall_s:.0f} s"
    return None
