"""Trial steps on a copy of a model, to find what `auto` and `range_test` stand for.

They leave no trace in the model or in random numbers, and are the same each time on the same machine: what is asked is
how much memory a step takes, not how much happens to be free.
"""

from __future__ import annotations

import copy
import random
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from captioning.datasets import CaptionBatches, Share
from captioning.decoders import Decoder
from captioning.heuristics import smooth
from captioning.live import LiveCaptioner
from captioning.loop import Journal
from captioning.memory import is_out_of_memory
from captioning.resolving import set_sizes
from captioning.self_critical import Rewards
from captioning.train_params import ConstantScheduler, PlainTrainParams
from captioning.training import DecoderTask
from captioning.training_data import Data

CPU_BUDGET = 2 * 10**9
"""Bytes of tensors in a step on a CPU, with Adam's copies of the weights. The process takes up to twice as much: for
operators' own buffers, and what the allocator keeps. A constant, as other programs share that memory and more images at
once are hardly faster there."""
GPU_SHARE = 0.8
"""Of a GPU's whole memory; the rest is for fragments, libraries and longer captions than those tried."""
OPTIMIZER_COPIES = 3
"""Of the weights: Adam's two means, and an average of the weights."""
PROBES = (1, 2, 4, 8, 16)
"""Images of the trial steps."""
LAST_EPOCH = 10**6
"""With gradual unfreezing, an epoch in which all stages learn that ever will."""

NUM_RATES, LOWEST_RATE, HIGHEST_RATE = 120, 1e-5, 10.0
DIVERGED = 2.0
"""A range test ends where the smoothed loss is so many times its minimum."""


def images_that_fit(model: Decoder, data: Data, settings: PlainTrainParams) -> int:
    """Images of a step that fit into one process's memory: on the line through the memory of its last two trials."""
    with leaving_no_trace():
        task = _rehearse(model, data, settings.model_copy(update={"batch_size": PROBES[-1]}))
        budget = _budget(task.device)
        weights = sum(p.numel() * p.element_size() for p in task.decoder.parameters())
        points = _probe(task, budget / 2)
    if len(points) < 2:
        return 1
    (few, before), (more, after) = points[-2:]
    each = max(1.0, (after - before) / (more - few))
    return max(1, int((budget - OPTIMIZER_COPIES * weights - (before - few * each)) / each))


def _probe(task: DecoderTask, enough: float) -> list[tuple[int, int]]:
    """Numbers of images, and the bytes of their step: twice as many each time, until `enough` bytes are taken. The
    first ones are taken up by what does not grow with images, such as the gradients of the weights."""
    task.decoder.begin_epoch(LAST_EPOCH)
    points: list[tuple[int, int]] = []
    for num_images in PROBES:
        try:
            points.append((num_images, bytes_of_step(task, num_images)))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            break
        if points[-1][1] > enough:
            break
    return points


def _budget(device: torch.device) -> float:
    if device.type == "cpu":
        return CPU_BUDGET
    return GPU_SHARE * torch.cuda.get_device_properties(device).total_memory


def _rehearse(model: Decoder, data: Data, settings: PlainTrainParams) -> DecoderTask:
    """Training of a copy at a rate of 1 that nothing changes; an encoder in it keeps its weights."""
    constant = ConstantScheduler(name="constant", warmup_steps=0, min_factor=0.0)
    off = {"ema_decay": None, "compile": False, "log_every_steps": 10**9}
    settings = settings.model_copy(update={"scheduler": constant, **off})
    set_sizes(data, settings)
    copied = copy.deepcopy(model)
    parts = [(named, 0.0) for named in copied.trainable().values()] if isinstance(copied, LiveCaptioner) else []
    return DecoderTask(copied, *data, settings, 1.0, Journal(lambda *entry: None), encoder_parts=parts)


def bytes_of_step(task: DecoderTask, num_images: int) -> int:
    """The most memory that the gradients of one step take, for the images with the longest and most captions."""
    shares = [_hardest(task.train, num_images)]
    task.decoder.train()
    task.rewards = Rewards() if task.critic is not None else None  # what takes most
    with watching(task.device) as peak:
        task.backward(shares, 0, [slice(0, num_images)])
    return peak[0]


def _hardest(batches: CaptionBatches, num_images: int) -> Share:
    sizes = [len(group) * (1 + max(map(len, group))) for group in batches.captions]
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    return next(batches.epoch((order * num_images)[:num_images]))  # of a few images some come twice


@contextmanager
def watching(device: torch.device) -> Iterator[list[int]]:
    """Yields a list that holds the peak of allocated bytes afterwards: on a GPU of all there are, on a CPU of tensors
    made within."""
    found = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device)
    else:
        with PeakBytes() as mode:
            yield found
        found[0] = mode.peak


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators make and that live at the same time. What an operator needs for
    itself, and frees before it returns, is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._see((args, kwargs), counted=False)  # what was there before: a view of it is no new memory
        found = function(*args, **kwargs)
        self._see(found, counted=True)
        return found

    def _see(self, values: Any, counted: bool) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and (key := value.untyped_storage()._cdata) not in self._known:
                num_bytes = value.untyped_storage().nbytes() * counted
                self._known.add(key)
                self.now += num_bytes
                self.peak = max(self.peak, self.now)
                weakref.finalize(value.untyped_storage(), self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes


def range_test(
    model: Decoder, data: Data, settings: PlainTrainParams, num_processes: int = 1
) -> list[tuple[float, float]]:
    """A learning rate range test (Smith 2017): training with a rate that rises by the same factor from step to step,
    from 1e-5 to 10 in 120 steps, until the loss diverges.

    Args:
        num_processes: that will share a batch; here one takes all of it, in as many pieces.

    Returns:
        Each step's rate and loss, for `heuristics.choose_rate_by_test`.
    """
    with leaving_no_trace():
        task = _rehearse(model, data, settings.model_copy(update={"self_critical": None}))
        fitting = task.fittings["train"]
        fitting.num_images = -(-fitting.num_images // num_processes)
        base = task.stepper.learning_rates
        rates = np.geomspace(LOWEST_RATE, HIGHEST_RATE, NUM_RATES).tolist()
        steps = islice(chain.from_iterable(task.batches(epoch, 0) for epoch in count()), NUM_RATES)
        found: list[tuple[float, float]] = []
        for number, (rate, shares) in enumerate(zip(rates, steps, strict=True)):
            task.stepper.learning_rates = [rate * share for share in base]
            outcome = task.train_step(shares, number, False)
            if not outcome.finite or _has_diverged([*(loss for _, loss in found), outcome.loss]):
                break
            found.append((rate, outcome.loss))
    return found


def _has_diverged(losses: Sequence[float]) -> bool:
    curve = smooth(losses)
    return curve[-1] > DIVERGED * min(curve)


@contextmanager
def leaving_no_trace() -> Iterator[None]:
    """Puts the random numbers of Python, NumPy and torch back to where they were."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            for _ in devices:
                torch.cuda.empty_cache()
