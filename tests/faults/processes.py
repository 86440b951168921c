"""`dvc repro` in a session of its own with faults planned, its processes by role, and what it leaves running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from clone import Clone

INJECT = Path(__file__).parent / "inject"
MARK = "CAPSTAN_FAULTS_CLONE"
"""In the environment of every process of a case, so that none is overlooked."""
LIMIT_S = 300.0
GRACE_S = 75.0
"""For processes that were told to stop and save."""
POLL_S = 0.002


@dataclass(frozen=True)
class Outcome:
    """How one `dvc repro` ended."""

    code: int | None
    """Exit status, negative for a signal; None: it hung and was killed."""
    output: str
    fired: list[int]
    """Indices of the faults that happened."""


def role(process: psutil.Process) -> str:
    """What a process is: dvc, stage (in a run of several processes: torchrun), rank<n>, worker, writer, java, other."""
    try:
        words, environment = process.cmdline(), process.environ()
    except psutil.Error:
        return "other"
    if any(word.endswith("/dvc") for word in words):
        return "dvc"
    if "captioning.checkpoint_writer" in words:
        return "writer"
    if words and Path(words[0]).name == "java":
        return "java"
    if "--multiprocessing-fork" in words:
        return "worker"
    if words and "python" in Path(words[0]).name and any(word.startswith("stages.") for word in words):
        return f"rank{environment['RANK']}" if "RANK" in environment else "stage"
    return "other"


def roles(family: list[psutil.Process]) -> dict[int, str]:
    """Each member's role by pid. A stage's or a rank's fork (a loader's worker) has its cmdline, and is a worker."""
    found = {process.pid: role(process) for process in family}
    for process in family:
        with suppress(psutil.Error):
            if found[process.pid].startswith(("stage", "rank")) and found.get(process.ppid()) == found[process.pid]:
                found[process.pid] = "worker"
    return found


class Run:
    """One `dvc repro` under a plan of faults."""

    def __init__(self, clone: Clone, folder: Path, targets: list[str], faults: list[dict[str, Any]]) -> None:
        """`folder` (emptied by the caller) takes the plan, the trace, the log, and the marks of faults that fired."""
        self.folder, self.faults = folder, faults
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text(json.dumps({"root": str(clone.path), "faults": faults}))
        environment = clone.environment() | {MARK: str(clone.path), "CAPSTAN_FAULTS": str(folder)}
        environment |= {"PYTHONPATH": str(INJECT), "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= next((fault["environment"] for fault in faults if "environment" in fault), {})
        self.log = (folder / "log.txt").open("wb")
        self.dvc = psutil.Popen(
            ["dvc", "repro", *targets],
            cwd=clone.path,
            env=environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait(self, limit_s: float = LIMIT_S) -> Outcome:
        """Watches until dvc has ended, and kills what the plan leaves to us."""
        deadline = time.monotonic() + limit_s
        waiting = [index for index, fault in enumerate(self.faults) if fault["action"] == "tell"]
        while (code := self.dvc.poll()) is None and time.monotonic() < deadline:
            for index in [index for index in waiting if (self.folder / f"fired-{index}").exists()]:
                waiting.remove(index)
                self._strike(index, self.faults[index])
            time.sleep(POLL_S)
        if code is None:
            stop(processes_of(Path(json.loads((self.folder / "plan.json").read_text())["root"])), signal.SIGKILL)
            self.dvc.wait()
        self.log.close()
        output = (self.folder / "log.txt").read_text(errors="replace")
        return Outcome(code, output, [n for n in range(len(self.faults)) if (self.folder / f"fired-{n}").exists()])

    def _strike(self, index: int, fault: dict[str, Any]) -> None:
        answer = self.folder / f"done-{index}"
        if fault["delay_s"]:
            answer.touch()
            time.sleep(fault["delay_s"])
        family = [self.dvc, *self.dvc.children(recursive=True)] if self.dvc.is_running() else []
        chosen = _choose(family, fault["target"])
        stop(chosen, fault["signal"])
        if not chosen:
            (self.folder / f"fired-{index}").unlink()  # its target is not there (any more)
        answer.touch()


def _choose(family: list[psutil.Process], target: str) -> list[psutil.Process]:
    if target == "group":
        return family
    named = roles(family)
    return [process for process in family if named[process.pid] == target][:1]


def stop(processes: list[psutil.Process], number: int) -> None:
    """Sends a signal to all of them. SIGKILL: all are stopped first, so that none sees another die."""
    if number == signal.SIGKILL and len(processes) > 1:
        _send(processes, signal.SIGSTOP)
    _send(processes, number)


def _send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)


def processes_of(clone: Path) -> list[psutil.Process]:
    """Living processes that were started for this clone, whoever is their parent now."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.uids().real == os.getuid() and process.status() != psutil.STATUS_ZOMBIE:
                if process.environ().get(MARK) == str(clone):
                    found.append(process)
    return found


def orphans(clone: Path, grace_s: float = GRACE_S) -> list[str]:
    """Command lines of what still runs when all runs are over and a time of grace is, too; these are then killed."""
    end = time.monotonic() + grace_s
    while (left := processes_of(clone)) and time.monotonic() < end:
        time.sleep(0.1)
    lines = []
    for process in left:
        with suppress(psutil.Error):
            lines.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
    stop(left, signal.SIGKILL)
    return lines
