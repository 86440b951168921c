"""The process that hands a run's records on to Weights & Biases and TensorBoard.

    python -m captioning.run_logs.writer <folder> < /dev/null

begins both anew from `<folder>/records.jsonl`, follows the file whenever something comes on standard input, and ends
with its input: when the trainer closes it or dies, or at once as above. It answers by lines of JSON about each sink:
`error` is null when what had failed has been mended.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from captioning.run_logs.records import RECORDS, Record

LOCK, NOTES = "writer.lock", "writer.log"
ALONE_S = 60
"""How long it may take to end when the trainer is gone, or has closed the input."""
Say = Callable[[str | None], None]


class Sink(Protocol):
    """Somewhere that records go to. It begins empty; methods may raise anything."""

    def write(self, index: int, record: Record) -> None:
        """Record number `index` of the run, from 0."""
        ...

    def close(self) -> None: ...


def build_sink(name: str, folder: Path, about: Record, say: Say) -> Sink:
    """A sink that begins anew in `folder`; `say` tells the user of a problem."""
    if name == "wandb":
        from captioning.run_logs.wandb_sink import WandbSink

        return WandbSink(folder, about, say)
    from captioning.run_logs.tensorboard_sink import TensorBoardSink

    return TensorBoardSink(folder, about)


class Follower:
    """Reads the records as they come. A sink that fails is left, and begun anew at the end."""

    def __init__(self, folder: Path, tell: Callable[[Record], None]) -> None:
        self.folder, self._tell = folder, tell
        self._file = (folder / RECORDS).open("rb")
        self._sinks: dict[str, Sink | None] = {}
        self._about: Record | None = None
        self._count = 0

    def _say(self, name: str, error: str | None) -> None:
        self._tell({"sink": name, "error": error})

    def _try(self, name: str, action: Callable[[], Any]) -> Any:
        """Its result. Where it fails, the sink is given up for now; a package may raise whatever it likes."""
        try:
            return action()
        except Exception as error:
            self._sinks[name] = None
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self._say(name, f"logging.{name}: {reason}; training goes on without it")
            return None

    def follow(self) -> None:
        """Takes all whole lines that are there."""
        while True:
            start, line = self._file.tell(), self._file.readline()
            if not line.endswith(b"\n"):
                self._file.seek(start)  # not all of it is there yet
                return
            self._take(json.loads(line))

    def _take(self, record: Record) -> None:
        if self._about is None:
            self._about = record
            for name in record["sinks"]:
                self._sinks[name] = self._try(name, lambda name=name: self._build(name))  # type: ignore[misc]
            return
        for name, sink in self._sinks.items():
            if sink is not None:
                self._try(name, lambda sink=sink: sink.write(self._count, record))  # type: ignore[misc]
        self._count += 1

    def _build(self, name: str) -> Sink:
        assert self._about is not None
        return build_sink(name, self.folder, self._about, lambda error: self._say(name, error))

    def finish(self) -> None:
        """Begins anew what had failed, and closes all."""
        for name in list(self._sinks):
            is_whole = self._sinks[name] is not None
            sink = self._sinks[name] or self._try(name, lambda name=name: self._write_again(name))  # type: ignore[misc]
            if sink is None:
                continue
            closed = self._try(name, lambda sink=sink: (sink.close(), True))  # type: ignore[misc]
            if closed and not is_whole:
                self._say(name, None)

    def _write_again(self, name: str) -> Sink:
        sink = self._build(name)
        with (self.folder / RECORDS).open("rb") as file:
            for index, line in zip(range(-1, self._count), file, strict=False):
                if index >= 0:
                    sink.write(index, json.loads(line))
        return sink


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group; the trainer closes our input
    os.nice(19)
    folder, answers = Path(sys.argv[1]), os.dup(1)
    _divert_output(folder / NOTES)

    def tell(answer: Record) -> None:
        with suppress(BrokenPipeError):  # the trainer is gone
            os.write(answers, (json.dumps(answer) + "\n").encode())

    with suppress(OSError):  # a killed run's writer may still be finishing
        fcntl.flock(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), fcntl.LOCK_EX)
    follower = Follower(folder, tell)
    follower.follow()
    while os.read(0, 4096):
        follower.follow()
    signal.alarm(ALONE_S)  # nobody may be left to end this
    follower.follow()
    follower.finish()


def _divert_output(path: Path) -> None:
    """What the packages print goes into a file."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    except OSError:
        file = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(file, number)


if __name__ == "__main__":
    main()
