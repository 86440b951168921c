"""What is read of the machine: process trees, container limits, GPUs that tell all or little."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from watched import SLICE, WHOLE

from captioning import probes

ROOT = Path(__file__).parents[1]


def test_memory_is_that_of_the_whole_tree(tmp_path: Path) -> None:
    alone, _ = probes.process_tree_memory(os.getpid())
    code = "block = bytearray(80_000_000); print(len(block), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as child:
        assert child.stdout and child.stdout.readline() and child.stdin
        together, peak = probes.process_tree_memory(os.getpid())
        child.stdin.write("\n")
    assert together - alone > 60e6 and peak >= together
    assert probes.process_tree_memory(2**22 + 1) == (0, 0)


@pytest.mark.parametrize("text, limit", [("4000\n", 4000), ("max\n", None), ("x\n", None)])
def test_the_limit_of_a_container_counts(tmp_path: Path, text: str, limit: int | None) -> None:
    own = tmp_path / "self"
    own.write_text("0::/job/step\n")
    group = tmp_path / "cgroup/job"
    (group / "step").mkdir(parents=True)
    (group / "memory.max").write_text(text)
    (group / "step/memory.max").write_text("9000\n")
    (group / "memory.current").write_text("3000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 1200\nactive_file 5\n")
    found = probes.memory_limit(tmp_path / "cgroup", own)
    assert found and found.num_bytes == (limit or 9000)
    if limit:
        assert found.used() == 1795
    assert probes.memory_limit(tmp_path / "cgroup", tmp_path / "absent") is None


def test_the_older_kind_of_limit_counts_too(tmp_path: Path) -> None:
    own = tmp_path / "self"
    own.write_text("4:cpu,memory:/of/the/host\n1:name=systemd:/\n")
    memory = tmp_path / "memory"
    memory.mkdir()
    for name, text in {
        "limit_in_bytes": "500",
        "usage_in_bytes": "90",
        "stat": "a 1\ninactive_file 7\ntotal_inactive_file 9\ntotal_active_file 20\n",
    }.items():
        (memory / f"memory.{name}").write_text(text)
    found = probes.memory_limit(tmp_path, own)
    assert found and found.num_bytes == 500 and found.used() == 61


class FakeDriver:
    """NVML with two GPUs, of which the second tells only its memory (as a MIG slice does)."""

    class NVMLError(Exception):
        pass

    NVML_TEMPERATURE_GPU = 0

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return self._known(index, (0, 1))

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return self._known(uuid, ("GPU-a", "GPU-b")) == "GPU-b"

    def _known(self, name: Any, names: tuple[Any, ...]) -> Any:
        if name not in names:
            raise self.NVMLError("not found")
        return name

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        self._known(handle, (0,))
        return SimpleNamespace(gpu=37)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=99 if handle else 40, total=100)

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return self._known(handle, (0,)) + 61

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return self._known(handle, (0,)) + 251_250


@pytest.mark.parametrize(
    "visible, found",
    [(None, [WHOLE, SLICE]), ("1", [SLICE]), ("GPU-b, 0", [SLICE, WHOLE]), ("", []), ("-1", []), ("0,7,1", [WHOLE])],
)
def test_gpus_are_read_as_far_as_they_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, found: list[Any]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeDriver())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    reading = probes.Machine(tmp_path, lambda what, error: pytest.fail(f"{what}: {error}")).read()
    assert reading.get("gpu", []) == found


def test_without_a_driver_there_are_no_gpus_and_no_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoDriver(FakeDriver):
        def nvmlInit(self) -> None:
            raise self.NVMLError("Driver Not Loaded")

    monkeypatch.setitem(sys.modules, "pynvml", NoDriver())
    machine = probes.Machine(tmp_path, lambda what, error: pytest.fail(f"{what}: {error}"))
    assert "gpu" not in machine.read()
