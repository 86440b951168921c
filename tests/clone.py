"""Temporary clones of the project, in which tests run the real `dvc` on tiny data."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
LSTM, GRU = "efficientnet_lite0-lstm", "efficientnet_lite0-gru"

TINY: dict[str, Any] = {
    "source_settings": {
        "shapes": {"num_images": 24, "val_fraction": 0.2, "test_fraction": 0.25},
        "digits": {"num_images": 16, "val_fraction": 0.2, "test_fraction": 0.25},
    },
    "download": {"samples_per_shard": 16},
    "prepare": {"num_samples": 4},
    "decoders": ["lstm", "gru"],
    "decoder_settings": {
        name: {"embedding_dim": 16, "hidden_dim": 16, "attention_dim": 16, "region_dim": 16} for name in ("lstm", "gru")
    },
    "train": {"num_epochs": 2, "batch_size": 8, "scheduler": {"warmup_steps": 2}, "log_every_steps": 1},
    "generate": {"num_beams": 2, "max_length": 12},
    "blip": {
        "num_beams": 1,
        "max_length": 8,
        "small": {"image_px": 32, "hidden_dim": 16, "num_layers": 1, "num_heads": 2, "num_epochs": 1},
    },
    "report": {"num_images": 2, "num_attention_images": 1},
}


class Clone:
    """A git repository with the project's files as they are in the working tree, and its own DVC cache."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def make(cls, path: Path) -> Clone:
        """Copies what git tracks or would track, without results, with params made tiny."""
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
        ).stdout.decode()
        for name in listed.splitlines():
            if (ROOT / name).is_file() and not name.startswith(("tests/", "reports/", "docs/", "dvc.lock")):
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, path / name)
        clone = cls(path)
        clone.set(TINY)
        clone.run("git", "init", "-q", "-b", "main")
        clone.commit("start")
        return clone

    def copy(self, path: Path) -> Clone:
        """The same repository elsewhere, results and cache included."""
        shutil.copytree(self.path, path, symlinks=True)
        return Clone(path)

    def set(self, changes: dict[str, Any]) -> None:
        """Merges values into params.yaml."""
        from captioning.cli import merge

        yaml = YAML()
        tree = yaml.load(self.path / "params.yaml")
        merge(tree, changes)
        yaml.dump(tree, self.path / "params.yaml")

    def environment(self) -> dict[str, str]:
        """What commands there see: this interpreter's programs, one thread, none of the caller's settings."""
        dropped = ("DVC_", "GIT_", "PYTHONPATH")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "DVC_NO_ANALYTICS": "1"}
        for role in ("AUTHOR", "COMMITTER"):
            environment |= {f"GIT_{role}_NAME": "test", f"GIT_{role}_EMAIL": "test@example.org"}
        return environment

    def run(self, *command: str, code: int | None = 0) -> str:
        """Runs a command there; returns stdout and stderr. `code`: the exit status it must have (None: any)."""
        done = subprocess.run(
            command,
            cwd=self.path,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=570,
        )
        output = done.stdout.decode(errors="replace")
        assert code is None or done.returncode == code, (
            f"{' '.join(command)} exited {done.returncode}:\n{output[-6000:]}"
        )
        return output

    def dvc(self, *arguments: str, code: int | None = 0) -> str:
        return self.run("dvc", *arguments, code=code)

    def stage(self, name: str, *arguments: str, code: int | None = 0) -> str:
        """Runs a stage as dvc.yaml does, without DVC."""
        return self.run(sys.executable, "-m", f"stages.{name}", *arguments, code=code)

    def commit(self, message: str) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-q", "--allow-empty", "-m", message)


def stages_run(output: str) -> list[str]:
    """Names of the stages that `dvc repro` ran, in order."""
    return re.findall(r"Running stage '([^']+)'", output)
