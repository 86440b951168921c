"""P10: how long it takes until a command that does nothing has ended: `python -m benchmarks.startup`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.measure import Row, in_turn, show

ROOT = Path(__file__).parents[1]


def measure_startup() -> Row:
    """Seconds of `python -m stages.<each> --help` and `python -m captioning --help`, each against one second."""
    stages = sorted(path.stem for path in (ROOT / "stages").glob("[a-z]*.py"))
    modules = [*(f"stages.{stage}" for stage in stages), "captioning"]

    def help_of(module: str) -> None:
        subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)

    times = in_turn({module: lambda module=module: help_of(module) for module in modules}, repeats=3)
    slowest = max(times, key=lambda module: times[module]["median_s"])
    return {
        "work": "P10 start of each stage and of the command line (--help)",
        "times": times,
        "ratios": {"slowest: share of 1 s": times[slowest]["median_s"]},
        "check": {"slowest": slowest},
    }


if __name__ == "__main__":
    show(measure_startup())
