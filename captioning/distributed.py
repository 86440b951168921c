"""Several processes as one run: torchrun starts them, collectives tie them together. Alone, everything here is a no-op.

Gradients are summed by one all-reduce over one flat buffer whose layout never changes. torch's DistributedDataParallel
rearranges its buckets after the first step of a process, so with three ranks or more a resumed run would add in another
order than one that was never stopped; this does not, and the decoders are small enough for one buffer.
Objects travel as JSON or safetensors bytes: torch's object collectives are pickle.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from captioning.precision import choose_device

TIMEOUT = timedelta(minutes=30)
"""A rank that hangs for so long brings the run down; one that dies does so at once."""


@dataclass(frozen=True)
class World:
    """This process's place among those that do the same work."""

    rank: int = 0
    num_processes: int = 1

    @property
    def is_main(self) -> bool:
        """The main process alone logs and writes."""
        return self.rank == 0

    def part(self, num_items: int) -> range:
        """This rank's items of `num_items`: every `num_processes`-th, so ranks' loads differ by one item at most."""
        return range(self.rank, num_items, self.num_processes)

    def sum_flat(self, tensors: Sequence[Tensor], extras: Sequence[float] = ()) -> list[float]:
        """Adds tensors over all ranks in place, and a few numbers with them, in one all-reduce.

        Args:
            tensors: of one dtype and device, the same shapes in the same order on every rank.

        Returns:
            The sums of `extras`, rounded to the tensors' dtype.
        """
        if self.num_processes == 1:
            return list(extras)
        numbers = tensors[0].new_tensor(extras)
        flat = torch.cat([*(tensor.reshape(-1) for tensor in tensors), numbers])
        dist.all_reduce(flat)
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()
        return [float(value) for value in flat[start:].tolist()]

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """Adds float64 numbers over all ranks."""
        if self.num_processes == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values)
        return [float(value) for value in values.tolist()]

    def gather(self, content: bytes) -> list[bytes]:
        """Every rank's bytes, in the order of ranks, on every rank."""
        if self.num_processes == 1:
            return [content]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.num_processes)]
        dist.all_gather(lengths, torch.tensor([len(content)]))
        longest = max(int(length) for length in lengths)
        mine = torch.zeros(max(longest, 1), dtype=torch.uint8)
        if content:
            mine[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        found = [torch.zeros_like(mine) for _ in lengths]
        dist.all_gather(found, mine)
        return [bytes(part[: int(length)].numpy()) for part, length in zip(found, lengths, strict=True)]

    def broadcast(self, content: bytes) -> bytes:
        """The main process's bytes, on every rank."""
        return self.gather(content if self.is_main else b"")[0]

    def share(self, value: Any) -> Any:
        """The main process's plain value (what JSON can write), on every rank."""
        return json.loads(self.broadcast(json.dumps(value).encode()))

    def wait(self) -> None:
        """Returns when every rank is here."""
        if self.num_processes > 1:
            dist.barrier()


ALONE = World()


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def join_world() -> Iterator[World]:
    """This process's world; under torchrun, with collectives (gloo for CPU tensors, NCCL for the GPUs')."""
    if not is_launched():
        yield ALONE
        return
    backend = "cpu:gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(choose_device())
        backend += ",cuda:nccl"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def launch(module: str, arguments: Sequence[str], num_processes: int, max_restarts: int) -> int:
    """Runs `python -m <module> <arguments>` in several processes through torchrun, within this one.

    Several hosts: torchrun reads its options from the environment too (`PET_NNODES`, `PET_RDZV_ENDPOINT`, …); where
    they name a rendezvous, this host takes part in that one instead of making its own.

    Returns:
        The exit status. A rank that dies takes the others with it; torchrun starts all again, `max_restarts` times.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    # Else restarted processes find the dead ones' addresses in the agent's store, and connect to nobody.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    options = [f"--nproc-per-node={num_processes}", f"--max-restarts={max_restarts}"]
    options += [] if "PET_RDZV_ENDPOINT" in os.environ or "PET_MASTER_ADDR" in os.environ else ["--standalone"]
    try:
        torchrun.main([*options, "-m", module, *arguments])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"error: rank {rank} ended with exit status {failure.exitcode}; see above", file=sys.stderr)
        return 1
    except SignalException as signal:
        return 128 + int(signal.sigval)
    return 0
