"""Checkpoints of a training run: saved asynchronously, verified when read, the newest good one wins.

A checkpoint is a committed folder `step-NNNNNNNN` (`captioning.storage.commit`): `state.safetensors` and `state.json`
hold the state's tree, `journal.jsonl` what was logged up to that step. It is whole by construction, and a changed bit
in any of its files is found by digest when it is read.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning import monitoring, storage
from captioning.checkpoint_writer import JOURNAL, PLAIN, TENSORS, checkpoint_folders
from captioning.errors import DamagedError
from captioning.params import RecoveryParams
from captioning.tensor_files import SharedBuffer, copy_tensors, join_tree, parse_tensors, split_tree

NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    step: int
    epoch: int
    state: Any
    """The tree that was saved; dicts' keys are strings, tuples are lists."""
    journal: list[dict[str, Any]]


def read_checkpoint(folder: Path, fingerprint: str) -> Checkpoint:
    """Reads and verifies one checkpoint; what is returned is what was saved.

    Raises:
        DamagedError: a file is missing, changed, or of another run.
    """
    manifest = storage.read_manifest(folder)
    about = manifest["about"]
    if about.get("fingerprint") != fingerprint or not folder.name.endswith(f"-{about.get('step'):08d}"):
        raise DamagedError(f"{folder} holds another run's or another step's files")
    content = {name: storage.read_committed(folder, name, manifest) for name in (TENSORS, PLAIN, JOURNAL)}
    state = join_tree(json.loads(content[PLAIN]), parse_tensors(content[TENSORS]))
    journal = [json.loads(line) for line in content[JOURNAL].splitlines()]
    return Checkpoint(about["step"], about["epoch"], state, journal)


def load_newest(folder: Path, fingerprint: str) -> Checkpoint | None:
    """The newest checkpoint that verifies, and one line on the console that says which. Bad ones are set aside.

    Returns:
        None where there is none, so that the run starts from its beginning.
    """
    damaged: list[str] = []
    for path in checkpoint_folders(folder):
        started = time.monotonic()
        try:
            found = read_checkpoint(path, fingerprint)
        except DamagedError:
            storage.set_aside(path, say=False)
            damaged.append(str(int(path.name.partition("-")[2])))
            continue
        num_bytes = sum(file["num_bytes"] for file in storage.read_manifest(path)["files"].values())
        verified = f"verified {num_bytes / 1e6:.0f} MB in {time.monotonic() - started:.2f} s"
        print(f"resumed from step {found.step} (epoch {found.epoch + 1}, {verified}){_aside(damaged)}", flush=True)
        return found
    if damaged:
        print(f"no checkpoint is whole, so it starts over from step 0{_aside(damaged)}", flush=True)
    return None


def _aside(damaged: list[str]) -> str:
    if len(damaged) > 1:
        return f"; steps {', '.join(damaged)} were damaged, set aside"
    return f"; step {damaged[0]} was damaged, set aside" if damaged else ""


class Checkpointer:
    """Saves a run's state while it goes on. One save is in flight at a time; a due one waits for the step after it.

    A disk without room, or one that refuses, never stops the run: the old checkpoints stay, the failure is a warning
    and an alert, and the next due save tries again.
    """

    def __init__(self, folder: Path, fingerprint: str, settings: RecoveryParams, lock: int) -> None:
        """`lock` is the work folder's; the writer process holds it too until it has ended."""
        self.folder, self.fingerprint, self.settings, self.lock = folder, fingerprint, settings, lock
        self.buffer = SharedBuffer()
        self.writer: subprocess.Popen[str] | None = None
        self.in_flight: int | None = None  # step
        self.last_step, self.last_time = 0, time.monotonic()
        self.asked = False
        self.last_error: str | None = None

    def load(self) -> Checkpoint | None:
        """The newest good checkpoint of this very run; see `load_newest`."""
        found = load_newest(self.folder, self.fingerprint)
        self.last_step = found.step if found else 0
        return found

    def ask(self) -> None:
        """Makes a save due, as soon as the writer is free."""
        self.asked = True

    def is_due(self, step: int) -> bool:
        """Whether the interval has passed, in steps or minutes, and the writer is free. Surfaces its errors."""
        if self.in_flight is not None and not self._answered():
            return False
        minutes = (time.monotonic() - self.last_time) / 60
        passed = step - self.last_step >= self.settings.checkpoint_steps
        return self.asked or passed or minutes >= self.settings.checkpoint_minutes

    def save(self, step: int, epoch: int, state: Any, journal: list[str], wait: bool = False) -> bool:
        """Copies the state and hands it to the writer; with `wait`, returns when it is on disk.

        Args:
            state: nested dicts and lists of tensors and plain values.
            journal: JSON lines.

        Returns:
            False where it was not saved (or, without `wait`, not begun).
        """
        if self.in_flight is not None:
            self._take_answer()
        self.last_step, self.last_time, self.asked = step, time.monotonic(), False
        plain, tensors = split_tree(state)
        if not self._has_room(sum(t.numel() * t.element_size() for t in tensors.values())):
            return False
        request = {
            "num_bytes": copy_tensors(tensors, self.buffer),
            "plain": json.dumps(plain),
            "journal": "".join(f"{line}\n" for line in journal),
            "about": {"fingerprint": self.fingerprint, "step": step, "epoch": epoch},
            "folder": str(self.folder),
            "keep": self.settings.keep_checkpoints,
        }
        self.in_flight = step
        self._send(json.dumps(request))
        return self._take_answer() if wait else True

    def _has_room(self, num_bytes: int) -> bool:
        """Twice the size, so that the disk is not filled to the last byte."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            self._failed(f"saving is paused: {error.strerror} ({self.folder})")
            return False
        if free < 2 * num_bytes:
            self._failed(
                f"saving is paused: a checkpoint has {num_bytes / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB left"
            )
            return False
        return True

    def _send(self, line: str) -> None:
        if self.writer is None:
            self.writer = self._start_writer()
        assert self.writer.stdin is not None
        try:
            self.writer.stdin.write(line + "\n")
            self.writer.stdin.flush()
        except BrokenPipeError:
            pass  # it died: `_take_answer` finds out

    def _start_writer(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "captioning.checkpoint_writer", str(self.buffer.descriptor)]
        library = str(Path(storage.__file__).parents[1])  # the working directory may be another
        search = os.pathsep.join(filter(None, [library, os.environ.get("PYTHONPATH")]))
        return subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": search},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(self.buffer.descriptor, self.lock),
            start_new_session=True,  # torchrun kills the whole group of a rank
        )

    def _answered(self) -> bool:
        """Whether the writer's answer is there (or it is gone); takes it, without waiting."""
        import select

        assert self.writer is not None and self.writer.stdout is not None
        if not select.select([self.writer.stdout], [], [], 0)[0]:
            return False
        self._take_answer()
        return True

    def _take_answer(self) -> bool:
        assert self.writer is not None and self.writer.stdout is not None
        line = self.writer.stdout.readline()
        step, self.in_flight = self.in_flight, None
        answer = json.loads(line) if line else {"error": "its writer process died"}
        if not line:
            self._end_writer()
        if "error" in answer:
            paused = "saving is paused: " if answer.get("errno") in NO_SPACE else ""
            self._failed(f"{paused}step {step} was not saved: {answer['error']}")
            return False
        if self.last_error is not None:
            self.last_error = None
            monitoring.clear("checkpoint")
        return True

    def _failed(self, message: str) -> None:
        self.last_error = message
        monitoring.alert("checkpoint", f"{message}; the earlier checkpoints are kept")

    def close(self) -> None:
        """Waits for a save in flight and ends the writer. Says once more if the last save failed."""
        if self.in_flight is not None:
            self._take_answer()
        self._end_writer()
        self.buffer.close()
        if self.last_error is not None:
            print(f"WARNING: the last save failed: {self.last_error}", file=sys.stderr, flush=True)

    def _end_writer(self) -> None:
        if self.writer is None:
            return
        for pipe in (self.writer.stdin, self.writer.stdout):
            with suppress(BrokenPipeError):  # what it did not take is of a save that failed
                if pipe is not None:
                    pipe.close()
        self.writer.wait()
        self.writer = None
        for leftover in self.folder.glob(".*.tmp"):  # of a writer that was killed
            storage.remove(leftover)
