"""The trainer's side of a run's log: records in a file, which a process of its own reads."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from captioning import monitoring

if TYPE_CHECKING:
    from captioning.logging_params import LoggingParams
    from captioning.run_logs.process import WriterProcess

RECORDS = "records.jsonl"
Record = dict[str, Any]
Look = Callable[[dict[str, float]], Record]
"""What an entry is given besides its metrics."""


def to_line(record: Record) -> str:
    """JSON behind its digest."""
    text = json.dumps(record, default=str)
    return f"{xxhash.xxh3_64_hexdigest(text.encode())} {text}\n"


def parse_line(line: bytes) -> Record | None:
    """None where it is not what was written."""
    digest, _, text = line.rstrip(b"\n").partition(b" ")
    if digest != xxhash.xxh3_64_hexdigest(text).encode():
        return None
    found: Record = json.loads(text)
    return found


def read_records(path: Path) -> list[Record | None]:
    """The first line is about the run, each other belongs to an entry of its journal; None for one that is damaged."""
    try:
        return [parse_line(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except OSError:
        return []


class RecordFile:
    """Appends lines. Those that a full disk refuses wait for the next call."""

    def __init__(self, path: Path, first: str) -> None:
        """Nothing is written yet: what lies there is replaced at the first call of `write`."""
        self.path = path
        self._waiting = [first]
        self._file: int | None = None
        self._size = 0

    @property
    def is_open(self) -> bool:
        return self._file is not None

    def add(self, line: str) -> None:
        self._waiting.append(line)

    def write(self) -> None:
        """Writes all that waits, or nothing. Raises OSError."""
        content = "".join(self._waiting).encode()
        if self._file is None:
            self._replace(content)
        else:
            self._append(self._file, content)
        self._size += len(content)
        self._waiting = []

    def _replace(self, content: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, self.path)  # a kill leaves the earlier records or these
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def _append(self, file: int, content: bytes) -> None:
        try:
            if os.write(file, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                os.ftruncate(file, self._size)
            raise

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class RunLog:
    """Keeps records and sees that they are handed on. Problems become alerts: no method raises an Exception."""

    def __init__(self, folder: Path, about: Record, settings: LoggingParams) -> None:
        """`about` is the file's first line. Nothing is written before the first new entry (or `close`)."""
        self.folder, self.settings = folder, settings
        self.look: Look | None = None
        self._old = read_records(folder / RECORDS)[1:]
        self._file = RecordFile(folder / RECORDS, to_line(about))
        self._count = 0
        self._writer: WriterProcess | None = None
        self._is_lost = False
        """The writer; it is not started again before the end."""

    def again(self, step: int, metrics: dict[str, float]) -> None:
        """An entry of an earlier process: its record is taken up, if that is still there."""
        record: Record = {"step": step, "metrics": metrics}
        old = self._old[self._count] if self._count < len(self._old) else None
        is_known = old is not None and to_line({name: old.get(name) for name in record}) == to_line(record)
        self._keep(old if old is not None and is_known else {**record, "time": round(time.time(), 3)})

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """A new entry."""
        record: Record = {"step": step, "metrics": metrics, "time": round(time.time(), 3)}
        try:
            record |= self.look(metrics) if self.look else {}
        except Exception as error:
            monitoring.alert("log_samples", f"samples and measurements are not logged ({error!r}); training goes on")
        self._keep(record)
        self._write()
        self._nudge()

    def _keep(self, record: Record) -> None:
        self._file.add(to_line(record))
        self._count += 1

    def _write(self) -> None:
        try:
            self._file.write()
            monitoring.clear("log_records")
        except OSError as error:
            message = f"{self.folder} cannot be written ({error.strerror}): logging waits, training goes on"
            monitoring.alert("log_records", message)

    def _nudge(self) -> None:
        if not self._file.is_open or self._is_lost:
            return
        try:
            self._writer = self._writer or self._start_writer()
            self._is_lost = not self._writer.nudge()
        except OSError:
            self._is_lost = True
        if self._is_lost:
            monitoring.alert("log_writer", "the process that writes logs died; what it missed is written at the end")

    def _start_writer(self) -> WriterProcess:
        from captioning.run_logs.process import WriterProcess

        return WriterProcess(self.folder)

    def close(self, seconds: float) -> None:
        """Waits until all is handed on, but no longer than `seconds`. Leaves no process behind, interrupted or not."""
        if not self._count:
            return
        self._write()
        try:
            if self._is_lost or self._writer is None:
                self._end_writer()
                self._writer = self._start_writer() if self._file.is_open else None  # it begins all anew
            if self._writer is not None:
                self._writer.finish(seconds)
        except OSError as error:
            monitoring.alert("log_writer", f"the log was not finished ({error.strerror})")
        finally:
            self._end_writer()
            self._file.close()

    def _end_writer(self) -> None:
        if self._writer is not None:
            self._writer.end()
            self._writer = None
