"""What every stage's `main()` shares: a clear end for errors that a user can mend, and a record of its time."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

# Read when torch loads OpenMP, so set before. Threads that spin while they wait for each other are three times slower
# as soon as anything else (a loader's worker, another stage) wants a core: 2.9 s against 0.9 s a training step.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def run(main: Callable[[], None]) -> None:
    """Calls a stage's `main` as `run_command` does, and records how long it took."""
    started = time.monotonic()
    run_command(main)
    _record_time(_stage_name(), time.monotonic() - started)


def run_command(main: Callable[[], None]) -> None:
    """Calls `main`. A `CapstanError` is printed without a traceback and ends with exit code 1."""
    from captioning.errors import CapstanError

    # torch asks for a package that DVCLive installs under its old name; a user can do nothing about it.
    warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)
    try:
        main()
    except CapstanError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: nothing was published; run `dvc repro` again to go on", file=sys.stderr)
        sys.exit(130)


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
