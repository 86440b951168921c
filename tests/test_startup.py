"""Commands answer at once: what takes a second to import is imported only where it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = [f"stages.{path.stem}" for path in sorted((ROOT / "stages").glob("[!_]*.py"))]
HEAVY = {"dvclive", "h5py", "img2dataset", "matplotlib", "pandas", "pyarrow", "scipy", "seaborn", "sklearn", "torch"}
HEAVY |= {"gensim", "tensorboard", "torchvision", "transformers", "wandb", "webdataset"}


def imported_by(module: str) -> set[str]:
    """Top-level packages that `python -m <module> --help` imports."""
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert module in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize("module", [*STAGES, "captioning"])
def test_help_imports_nothing_heavy(module: str) -> None:
    found = imported_by(module)
    assert {"argparse", "captioning"} <= found
    assert not found & HEAVY
