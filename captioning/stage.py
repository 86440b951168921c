"""What every stage's `main()` shares: signals, health, a clear end for errors that a user can mend, its time."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from captioning.params import Params

# Read when torch loads OpenMP (GNU's), so set before: how long threads spin while they wait for each other. Beside
# other work (a loader's worker, another stage) its 300000 make a training step three times as slow; to sleep at once
# (OMP_WAIT_POLICY=PASSIVE) makes it 1.7 times as slow on an idle machine. docs/performance.md has the numbers.
if "OMP_WAIT_POLICY" not in os.environ:  # what a user says counts
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

GIGABYTE = 10**9


def run(main: Callable[[], None]) -> None:
    """Calls a stage's `main` as `run_command` does, and records how long it took."""
    from captioning.interruption import raise_on_signals
    from captioning.orphans import die_with_parent

    if "DVC_STAGE" in os.environ or _is_rank():
        die_with_parent()  # with SIGTERM, so that it saves; DVC would delete what an orphan publishes
    raise_on_signals()
    started = time.monotonic()
    run_command(main)
    if os.environ.get("RANK", "0") == "0":
        _record_time(_stage_name(), time.monotonic() - started)


def run_command(main: Callable[[], None]) -> None:
    """Calls `main`. A `CapstanError` is printed without a traceback and ends with exit code 1."""
    from captioning.errors import CapstanError
    from captioning.interruption import Interrupted

    # torch asks for a package that DVCLive installs under its old name; a user can do nothing about it.
    warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)
    try:
        main()
    except CapstanError as error:
        print(f"error: {error}", file=sys.stderr)
        if _is_rank() and os.getppid() != 1:
            os.kill(os.getppid(), signal.SIGTERM)  # torchrun would only run into the same error again
        sys.exit(1)
    except (KeyboardInterrupt, Interrupted) as error:
        number, note = getattr(error, "number", signal.SIGINT), getattr(error, "note", "")
        if os.environ.get("RANK", "0") == "0":
            kept = note or "finished parts are kept"
            print(f"interrupted: {kept}; `dvc repro` goes on from there", file=sys.stderr)
        sys.exit(128 + number)


@contextmanager
def running(params: Params) -> Iterator[None]:
    """Around a stage's work: clears away old work in progress, and watches the machine's health."""
    from captioning import monitoring, paths, work

    if os.environ.get("RANK", "0") != "0":
        yield
        return
    work.prune(params.recovery.keep_work_days, int(params.recovery.min_free_gb * GIGABYTE))
    with monitoring.watch(_stage_name(), params.monitoring, paths.work_root() / "health"):
        yield


def run_processes(num_processes: int, max_restarts: int, several_hosts: bool = False) -> bool:
    """Starts this stage's command again in several processes, if several are asked for and this is not one of them.

    Args:
        several_hosts: the stage can run on more than one; then torchrun's own variables (`PET_NNODES`) ask for them.

    Returns:
        Whether it did: then all is done. Exits where they failed.
    """
    several = num_processes > 1 or (several_hosts and "PET_NNODES" in os.environ)
    if _is_rank() or not several:
        return False
    from captioning.distributed import launch

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun has its own handlers
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = launch(f"stages.{Path(sys.argv[0]).stem}", sys.argv[1:], num_processes, max_restarts)
    if status:
        sys.exit(status)
    return True


def _is_rank() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _stage_name() -> str:
    """`train@efficientnet_lite0-lstm` from `stages/train.py efficientnet_lite0 lstm`."""
    names = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    return Path(sys.argv[0]).stem + (f"@{'-'.join(names)}" if names else "")


def _record_time(name: str, seconds: float) -> None:
    """Keeps the last duration of each stage in `.work/times.json`, for the report. Not an out: times are not exact."""
    from captioning import paths

    folder = paths.work_root()
    folder.mkdir(exist_ok=True)
    with (folder / "times.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # stages of queued experiments may end together
        path = folder / "times.json"
        try:
            times = json.loads(path.read_text())
        except (OSError, ValueError):
            times = {}
        times[name] = round(seconds, 2)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(times, indent=1, sort_keys=True))
        temporary.replace(path)
