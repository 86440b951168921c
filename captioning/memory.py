"""Batches that fit into memory: what does not is done again in halves, and said."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from captioning.errors import CapstanError

Result = TypeVar("Result")

SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "out of memory",
)
"""By which errors of other types tell that memory ran out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


class Fitting:
    """How many images at once fit into memory: known from trying, and only ever less.

    Threads may share one; each halves what it tried itself, so two that fail together halve once.
    """

    def __init__(self, num_images: int, device: torch.device) -> None:
        """`num_images`: to begin with."""
        self.num_images, self.device = num_images, device
        self._lock = threading.Lock()

    def run(self, work: Callable[[list[slice]], Result], num_images: int) -> Result:
        """Calls `work` with consecutive parts of `range(num_images)` that cover it, each of what fits at most.

        After out-of-memory `work` is called again, for all images, with parts half as long: it begins by undoing what
        the call before left (gradients added up, random numbers drawn).

        Raises:
            CapstanError: one image alone does not fit.
        """
        while True:
            tried = min(self.num_images, num_images)
            try:
                return work([slice(i, min(i + tried, num_images)) for i in range(0, num_images, tried)])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error).splitlines()[0][:200]
            self._halve(tried, said)  # here, where the error no longer keeps its frames' tensors alive

    def _halve(self, tried: int, said: str) -> None:
        if tried == 1:
            raise CapstanError(
                f"out of memory with a single image ({said}). Free memory (what else runs?), or use a smaller encoder."
            )
        with self._lock:
            if tried // 2 < self.num_images:
                self.num_images = tried // 2
                print(f"out of memory with {tried} images at once: {self.num_images} from here on", flush=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # free blocks of other sizes are in the way
