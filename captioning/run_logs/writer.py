"""The process that hands a run's records on to Weights & Biases and TensorBoard.

    python -m captioning.run_logs.writer <folder> [wandb|tensorboard ...] < /dev/null

begins anew from `<folder>/records.jsonl`, follows the file whenever something comes on standard input, and ends with
its input: when the trainer closes it or dies, or at once as above. It answers by lines of JSON about each sink: `error`
is null for one that is whole at the end. What fails is tried once more then.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from captioning.errors import CapstanError
from captioning.run_logs.records import RECORDS, Record, parse_line

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
    """Reads the records as they come. A sink that fails is left; `finish` names it."""

    def __init__(self, folder: Path, tell: Callable[[Record], None], names: Sequence[str] = ()) -> None:
        """`names`: of the sinks; none: those that the records' first line names."""
        self.folder, self.names, self._tell = folder, list(names), tell
        self._file = (folder / RECORDS).open("rb")
        self._sinks: dict[str, Sink | None] = {}
        self._about: Record | None = None
        self._count = 0

    def _say(self, name: str, error: str | None) -> None:
        self._tell({"sink": name, "error": error})

    def _try(self, name: str, action: Callable[[], Any]) -> Any:
        """Its result. Where it fails, the sink is left: a package may raise whatever it likes."""
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
                self._file.seek(start)  # the rest is still to come
                return
            record = parse_line(line)
            if self._about is None:
                self._begin(record)
            else:
                self._take(record)

    def _begin(self, about: Record | None) -> None:
        if about is None:
            raise CapstanError(f"{self.folder / RECORDS} is damaged: it cannot be written again from there")
        self._about = about
        for name in self.names or about["sinks"]:
            say = partial(self._say, name)
            self._sinks[name] = self._try(name, partial(build_sink, name, self.folder, about, say))

    def _take(self, record: Record | None) -> None:
        for name, sink in self._sinks.items():
            if sink is not None and record is not None:
                self._try(name, partial(sink.write, self._count, record))
        self._count += 1

    def finish(self) -> list[str]:
        """Closes all. Returns the names of those that failed."""
        for name, sink in list(self._sinks.items()):
            if sink is not None:
                self._try(name, sink.close)
            if self._sinks[name] is not None:
                self._say(name, None)
        return [name for name, sink in self._sinks.items() if sink is None]


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group; the trainer closes our input
    os.nice(19)
    folder, names, answers = Path(sys.argv[1]), sys.argv[2:], os.dup(1)
    environment = dict(os.environ)  # packages keep things there
    _divert_output(folder / NOTES)

    def tell(answer: Record) -> None:
        with suppress(BrokenPipeError):  # the trainer is gone
            os.write(answers, (json.dumps(answer) + "\n").encode())

    if not names:
        _wait_for_turn(folder / LOCK)
    follower = Follower(folder, tell, names)
    follower.follow()
    while os.read(0, 4096):
        follower.follow()
    signal.alarm(ALONE_S)  # nobody may be left to end this
    follower.follow()
    failed = follower.finish()
    if failed and not names:
        # Once more, in a process of its own: packages remember what failed.
        command = [sys.executable, "-m", "captioning.run_logs.writer", str(folder), *failed]
        subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=answers, check=False)


def _wait_for_turn(path: Path) -> None:
    """A killed run's process may still be finishing."""
    with suppress(OSError):
        fcntl.flock(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), fcntl.LOCK_EX)


def _divert_output(path: Path) -> None:
    """What the packages print goes into a file."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:
        file = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(file, number)


if __name__ == "__main__":
    main()
