"""Processes and their parents: children die with them, and a stage that outlived DVC is found and stopped."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
GRACE_S = 60.0
"""For saving a checkpoint after SIGTERM; then comes SIGKILL."""


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Asks the kernel to send this process a signal when its parent dies. Linux only; elsewhere nothing happens."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), number)


def bound_to_parent(command: Sequence[str]) -> list[str]:
    """The command for a foreign program such that it is killed when its parent dies; see `die_with_parent`."""
    return [sys.executable, "-P", __file__, *command]  # -P: our modules must not hide Python's own


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, and who started it. Start times tell a process from a later one with the same number."""

    pid: int
    started: float
    ancestors: list[tuple[int, float]]
    """Numbers and start times of those without whom it is an orphan: its parent, and DVC where a shell is between."""
    launcher: tuple[int, float] | None
    """torchrun's, which would start a rank again that is told to stop."""

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """What `describe_self` wrote; None where nothing legible is there (yet)."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def is_alive(self) -> bool:
        return _started(self.pid) == self.started

    def is_orphan(self) -> bool:
        return self.is_alive() and any(_started(pid) != started for pid, started in self.ancestors)


def describe_self() -> bytes:
    """This process as a `Holder`, for a lock file."""
    import psutil

    parents = psutil.Process().parents()
    # Some shells stay between DVC and its stage, and torchrun is between a rank and both.
    above = [n for n, parent in enumerate(parents[:4]) if _is_dvc(parent)] if "DVC_STAGE" in os.environ else []
    ancestors = [(parent.pid, _started(parent.pid)) for parent in parents[: above[0] + 1 if above else 1]]
    launcher = ancestors[0] if "TORCHELASTIC_RUN_ID" in os.environ and ancestors else None
    return json.dumps(asdict(Holder(os.getpid(), _started(os.getpid()), ancestors, launcher))).encode()


def _is_dvc(process: Any) -> bool:
    import psutil

    try:
        return any(Path(argument).name == "dvc" for argument in process.cmdline()[:3])
    except psutil.Error:
        return False


def _started(pid: int) -> float:
    import psutil

    try:
        process = psutil.Process(pid)
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return 0.0


def stop_orphan(holder: Holder) -> bool:
    """Stops a process whose parent is gone: SIGTERM, so that it saves, then SIGKILL for it and its children.

    Returns:
        Whether it was one. False: it is somebody's, or already on its way out.
    """
    import psutil

    if not holder.is_orphan():
        return False
    print(f"process {holder.pid} of an earlier run outlived it: told to stop", flush=True)
    try:
        launched = holder.launcher and _started(holder.launcher[0]) == holder.launcher[1]
        process = psutil.Process(holder.launcher[0] if holder.launcher and launched else holder.pid)
        family = [*process.children(recursive=True), process]
        process.terminate()
        deadline = time.monotonic() + GRACE_S
        while (holder.is_alive() or process.is_running()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for member in family:
            if member.is_running():
                member.kill()
    except psutil.Error:
        pass  # it ended meanwhile
    return True


if __name__ == "__main__":  # `bound_to_parent`; what was asked of the kernel outlives exec
    die_with_parent(signal.SIGKILL)
    os.execvp(sys.argv[1], sys.argv[1:])
