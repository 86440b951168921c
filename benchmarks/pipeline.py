"""P8: `make repro` in a fresh clone, `dvc repro` with nothing to do, and the report alone.

    python -m benchmarks.pipeline       # O(12 min)

The clone is of the last commit, below .work, where it stays until the next time; it has this environment, so that to
install it is not timed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import Row, show
from captioning import paths, storage

ROOT = Path(__file__).parents[1]
GOALS = {"make repro": 12 * 60, "dvc repro, nothing to do": 10, "dvc repro --single-item --force report": 60}


def _seconds(folder: Path, *command: str) -> float:
    search = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": search}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return time.perf_counter() - started


def measure_pipeline() -> Row:
    """Seconds of a user's three most common commands, each against its goal."""
    clone = paths.work_root() / "benchmark" / "capstan"
    storage.remove(clone)
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    (clone / ".venv").symlink_to(sys.prefix)
    seconds = {
        "make repro": _seconds(clone, "make", "repro"),
        "dvc repro, nothing to do": _seconds(clone, "dvc", "repro"),
        "dvc repro --single-item --force report": _seconds(clone, "dvc", "repro", "-s", "-f", "report"),
    }
    return {
        "work": "P8 the default params in a fresh clone, after the install (2 to 4 min), one run",
        "times": {name: {"median_s": value, "min_s": value, "max_s": value} for name, value in seconds.items()},
        "ratios": {f"{name}: share of {GOALS[name]} s": value / GOALS[name] for name, value in seconds.items()},
        "check": {},
    }


if __name__ == "__main__":
    show(measure_pipeline())
