"""The process that hands records on, as the trainer sees it: it can be slow, hang or die, and training goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from captioning import monitoring

POLL_S = 0.02


class WriterProcess:
    """`captioning.run_logs.writer`, started. Only `finish` waits for it."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError: no process can be started."""
        library = str(Path(__file__).parents[2])  # the working directory may be another
        search = os.pathsep.join(filter(None, [library, os.environ.get("PYTHONPATH")]))
        self.folder, self._heard = folder, b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "captioning.run_logs.writer", str(folder)],
            env={**os.environ, "PYTHONPATH": search},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # signals for the stage's group are not for it, and it can be killed with its own
        )
        assert self._process.stdin and self._process.stdout
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        for pipe in (self._stdin, self._stdout):
            os.set_blocking(pipe.fileno(), False)

    def nudge(self) -> bool:
        """Tells it that there is more, and hears what it has to say. False: it is dead."""
        with suppress(BlockingIOError, BrokenPipeError):  # a full pipe: it has not looked yet, and will
            os.write(self._stdin.fileno(), b".")
        self._hear()
        return self._process.poll() is None

    def _hear(self) -> None:
        try:
            self._heard += os.read(self._stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            told = json.loads(line)
            kind = f"log_{told['sink']}"
            monitoring.alert(kind, told["error"]) if told["error"] else monitoring.clear(kind)

    def finish(self, seconds: float) -> None:
        """Waits until all is written, but no longer than `seconds`."""
        until = time.monotonic() + seconds
        self._stdin.close()
        while self._process.poll() is None and time.monotonic() < until:
            self._hear()
            time.sleep(POLL_S)
        self._hear()
        late = "could not be handed on" if self._process.poll() is not None else f"was not handed on in {seconds:g} s"
        if self._process.returncode != 0:
            message = f"{self.folder} {late} to its end; docs/training.md says how to do so"
            monitoring.alert("log_writer", message)

    def end(self) -> None:
        """Kills it, with what it started, if it is still there."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in (self._stdin, self._stdout):
            pipe.close()
