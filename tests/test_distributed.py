"""Several processes through the real torchrun and gloo, on a task of 11 images in batches of 4: the last is uneven."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("ranks.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--max-restarts=1"]


def environment() -> dict[str, str]:
    ours = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **ours, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as `distributed.launch` sets it


def torchrun(*arguments: object) -> str:
    command = [*TORCHRUN, *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def read(folder: Path) -> Any:
    return json.loads((folder / "losses.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("alone")
    torchrun("--standalone", "--nproc-per-node=1", SCRIPT, folder)
    return read(folder)


@pytest.mark.parametrize("num_processes", [2, 3])
def test_losses_do_not_depend_on_the_number_of_processes(alone: Any, tmp_path: Path, num_processes: int) -> None:
    """At every step and in validation, to rounding. With 3 processes and a last batch of 3 images, or 2 and 1 more."""
    torchrun("--standalone", f"--nproc-per-node={num_processes}", SCRIPT, tmp_path)
    found = read(tmp_path)
    assert found["num_processes"] == num_processes and len(found["losses"]) == 12
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for mine, wanted in zip(found["history"], alone["history"], strict=True):
        assert mine == pytest.approx(wanted, rel=1e-5)


@pytest.fixture(scope="module", params=[[], ["critical"]], ids=["cross entropy", "then self-critical"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Two processes with dropout, never stopped; and the words that make their task."""
    folder = tmp_path_factory.mktemp("whole")
    torchrun("--standalone", "--nproc-per-node=2", SCRIPT, folder, "keep", *request.param)
    return folder, request.param


@pytest.mark.parametrize(("rank", "step"), [(0, 5), (1, 7)])
def test_a_rank_that_dies_brings_the_run_down_and_it_ends_with_the_same_bits(
    whole: tuple[Path, list[str]], tmp_path: Path, rank: int, step: int
) -> None:
    """A kill in the middle of an epoch; torchrun starts both processes again."""
    folder, words = whole
    output = torchrun("--standalone", "--nproc-per-node=2", SCRIPT, tmp_path, "kill", rank, step, *words)
    assert (tmp_path / "killed").exists() and "resumed from step" in output
    for name in ("losses.json", "weights.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert len(read(tmp_path)["losses"]) == 12


def test_two_hosts_meet_by_torchruns_own_rendezvous(alone: Any, tmp_path: Path) -> None:
    """Two agents with a process each, as on two hosts, each with its own copy of the data; the first one writes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
    hosts = [
        subprocess.Popen(
            [*TORCHRUN, *meeting, f"--node-rank={number}", str(SCRIPT), str(tmp_path / str(number))],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [host.communicate(timeout=300)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert not (tmp_path / "1" / "losses.json").exists()
    assert read(tmp_path / "0")["losses"] == pytest.approx(alone["losses"], rel=1e-5)
