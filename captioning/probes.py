"""What the machine is doing: processors, memory, disk, network, GPUs. Each reading costs well under a millisecond.

From the kernel's own files where psutil would read every process of the machine, and from NVML (nvidia-ml-py).
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Reading = dict[str, Any]
PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


class Machine:
    """Reads the machine again and again; rates are those since the reading before."""

    def __init__(self, folder: Path, complain: Callable[[str, Exception], None]) -> None:
        """
        Args:
            folder: on the disk whose free space counts.
            complain: called for each probe that fails (by name); the other probes' values are read all the same.
        """
        self._folder, self._complain = folder, complain
        self._counters: dict[str, int] = {}
        self._counted_at = time.monotonic()
        self._memory_limit = memory_limit()
        self._gpus: list[Any] = []
        self._guard("GPUs", self._find_gpus)
        self.read()  # rates and CPU load need a point to count from

    def read(self) -> Reading:
        """All values that can be had now: bytes, bytes per second, percent, °C and watts."""
        reading: Reading = {}
        probes = {
            "CPU": self._read_cpu, "process memory": self._read_processes, "memory": self._read_memory,
            "free disk": self._read_disk, "throughput": self._read_throughput, "GPUs": self._read_gpus,
        }  # fmt: skip
        for name, probe in probes.items():
            reading |= self._guard(name, probe) or {}
        return reading

    def _guard(self, name: str, probe: Callable[[], Any]) -> Any:
        try:
            return probe()
        except Exception as error:
            self._complain(name, error)
            return None

    def _read_cpu(self) -> Reading:
        import psutil

        return {"cpu_percent": psutil.cpu_percent(None)}

    def _read_processes(self) -> Reading:
        now, peak = process_tree_memory(os.getpid())
        return {"rss": now, "rss_peak": peak}

    def _read_memory(self) -> Reading:
        import psutil

        memory = psutil.virtual_memory()
        limit = self._memory_limit
        if limit is not None and limit.num_bytes < memory.total:
            return {"ram_used": limit.used(), "ram_total": limit.num_bytes}
        return {"ram_used": memory.total - memory.available, "ram_total": memory.total}

    def _read_disk(self) -> Reading:
        return {"disk_free": shutil.disk_usage(self._folder).free}

    def _read_throughput(self) -> Reading:
        import psutil

        disk = psutil.disk_io_counters()  # None where the kernel shows none
        network = [card for name, card in psutil.net_io_counters(pernic=True).items() if name != "lo"]
        counters = {
            "net_received_per_s": sum(card.bytes_recv for card in network),
            "net_sent_per_s": sum(card.bytes_sent for card in network),
        }
        if disk is not None:
            counters |= {"disk_read_per_s": disk.read_bytes, "disk_write_per_s": disk.write_bytes}
        now, before = time.monotonic(), self._counters
        seconds = max(now - self._counted_at, 1e-9)
        self._counters, self._counted_at = counters, now
        # A card that goes away takes its count along: no negative rates.
        return {name: max(0, round((counters[name] - before[name]) / seconds)) for name in counters if name in before}

    def _find_gpus(self) -> None:
        self._gpus = open_gpus()

    def _read_gpus(self) -> Reading:
        return {"gpu": [read_gpu(handle) for handle in self._gpus]} if self._gpus else {}


def process_tree_memory(root: int) -> tuple[int, int]:
    """Resident bytes of a process and all its descendants, and the largest that any one of them ever held.

    Shared pages count in each process. The kernel keeps the second (VmHWM), so short peaks between samples are in it.
    """
    total, largest, waiting = 0, 0, [root]
    while waiting:
        process = PROC / str(waiting.pop())
        try:
            status = (process / "status").read_bytes()
            waiting.extend(_children(process))
        except OSError:
            continue  # it ended meanwhile
        total += _status_bytes(status, b"VmRSS:")
        largest = max(largest, _status_bytes(status, b"VmHWM:"))
    return total, max(total, largest)


def _children(process: Path) -> list[int]:
    """Read per thread from the kernel: psutil would read every process of the machine for it."""
    children: list[int] = []
    for thread in os.listdir(process / "task"):
        try:
            children.extend(map(int, (process / "task" / thread / "children").read_bytes().split()))
        except OSError:
            continue
    return children


def _status_bytes(status: bytes, name: bytes) -> int:
    _, found, rest = status.partition(name)
    return 1024 * int(rest.split(None, 1)[0]) if found else 0  # a zombie has no memory


class MemoryLimit:
    """The tightest memory limit that a container or a batch system sets on this process."""

    def __init__(self, folder: Path, num_bytes: int, usage: str, prefix: str) -> None:
        self.num_bytes = num_bytes
        self._usage, self._stat = folder / usage, folder / "memory.stat"
        self._cached = [f"\n{prefix}{name} ".encode() for name in ("inactive_file", "active_file")]

    def used(self) -> int:
        """Bytes that the kernel cannot drop: cached files do not count, for mapped features may fill any memory."""
        stat, used = b"\n" + self._stat.read_bytes(), int(self._usage.read_bytes())
        for name in self._cached:
            _, found, rest = stat.partition(name)
            used -= int(rest.split(None, 1)[0]) if found else 0
        return max(0, used)


def memory_limit(root: Path = CGROUPS, own: Path = PROC / "self/cgroup") -> MemoryLimit | None:
    """The limit of this process's control group or of one above it (cgroup v2 and v1); None without one."""
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    limits = []
    for _, controllers, path in groups:
        if controllers == "":
            limits += _limits(root, path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
            limits += _limits(root / "memory", path, *names)
    return min(limits, key=lambda limit: limit.num_bytes, default=None)


def _limits(root: Path, path: str, limit: str, usage: str, prefix: str) -> list[MemoryLimit]:
    group = root / path.strip("/")
    found = []
    for folder in (group, *group.parents):
        try:
            text = (folder / limit).read_text().strip()
            if text != "max":
                found.append(MemoryLimit(folder, int(text), usage, prefix))
        except (OSError, ValueError):
            pass  # inside a container the path may be that of the host
        if folder == root:
            break
    return found


def open_gpus() -> list[Any]:
    """NVML's handles of the GPUs that CUDA may use here; none without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    handles = []
    for name in filter(None, (part.strip() for part in visible.split(","))):
        try:  # a number in the order of the bus, or a UUID
            by_index = name.lstrip("-").isdigit()
            find = pynvml.nvmlDeviceGetHandleByIndex if by_index else pynvml.nvmlDeviceGetHandleByUUID
            handles.append(find(int(name) if by_index else name))
        except pynvml.NVMLError:
            break  # as CUDA does: what follows an invalid name is not visible
    return handles


def read_gpu(handle: Any) -> Reading:
    """One GPU's load (percent), memory (bytes), temperature (°C) and power (W); what it cannot tell is None."""
    import pynvml

    def ask(question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(handle, *arguments)
        except pynvml.NVMLError:  # a slice of a GPU (MIG) knows no load, some boards no power
            return None

    load, memory = ask(pynvml.nvmlDeviceGetUtilizationRates), ask(pynvml.nvmlDeviceGetMemoryInfo)
    power = ask(pynvml.nvmlDeviceGetPowerUsage)  # milliwatts
    return {
        "util": load and load.gpu,
        "memory_used": memory and memory.used,
        "memory_total": memory and memory.total,
        "temperature": ask(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
        "power_w": None if power is None else round(power / 1000, 1),
    }


def uses_gpu() -> bool:
    """Whether this process has begun to compute on a GPU. Asks torch only where the stage has loaded it."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return bool(cuda and cuda.is_initialized())
