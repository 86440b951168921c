"""P5: what checkpoints cost: the steps beside a save against those before and after, and the longest wait of a step.

python -m benchmarks.checkpointing
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.measure import Row, show
from benchmarks.workload import ENCODER_DIM, VOCABULARY_SIZE, build, synthetic_batch
from captioning import paths
from captioning.checkpoints import Checkpointer
from captioning.decoders import Decoder, DecoderConfig, build_decoder
from captioning.distributed import ALONE
from captioning.optimization import Stepper, build_adamw
from captioning.params import RecoveryParams
from captioning.precision import autocast, choose_device, choose_precision

INTERVAL = 50
WINDOW = 6
"""Steps watched before, from and after a save: the writer has ended in less, so that no other step can differ."""
NUM_PAIRS = 30


@contextmanager
def temporary_keeper() -> Iterator[Checkpointer]:
    """Saves on the project's disk, below `.work`: what a killed benchmark leaves there is ignored by git."""
    settings = RecoveryParams(
        checkpoint_steps=10**9,
        checkpoint_minutes=1e9,
        keep_checkpoints=2,
        max_restarts=0,
        keep_work_days=1,
        min_free_gb=0,
    )
    paths.work_root().mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=paths.work_root()) as folder, open(os.devnull, "w") as lock:
        keeper = Checkpointer(Path(folder), "benchmark", settings, lock.fileno())
        try:
            yield keeper
        finally:
            keeper.close()


class Training:
    """Steps on one batch, as a training run makes them, with as large a state."""

    def __init__(self, decoder: Decoder, num_images: int) -> None:
        self.device = choose_device()
        self.dtype = choose_precision("auto", self.device)
        self.batch, self.decoder = synthetic_batch(num_images).to(self.device), decoder.to(self.device)
        optimizer = build_adamw([(list(decoder.named_parameters()), 1e-4)], 0.01, (0.9, 0.999))
        self.stepper = Stepper(optimizer, 5.0, self.dtype, ALONE)
        self.best = {name: tensor.cpu().clone() for name, tensor in decoder.state_dict().items()}

    def step(self) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        with autocast(self.device, self.dtype):
            logits = self.decoder(self.batch)
        self.stepper.step(torch.nn.functional.cross_entropy(logits.float(), self.batch.packed_targets), 1.0)
        return time.perf_counter() - started

    def save(self, keeper: Checkpointer, step: int, wait: bool = False) -> float:
        """Seconds that training waits for."""
        started = time.perf_counter()
        state = {"decoder": self.decoder.state_dict(), "stepper": self.stepper.state_dict(), "best": self.best}
        keeper.save(step, 0, state, [], wait)
        return time.perf_counter() - started


def default_decoder() -> Decoder:
    """The LSTM of the default run, with the benchmarks' vocabulary."""
    torch.manual_seed(0)
    return build_decoder(
        DecoderConfig(
            type="lstm",
            attention="bahdanau",
            context_gate=True,
            vocabulary_size=VOCABULARY_SIZE,
            encoder_dim=ENCODER_DIM,
            embedding_dim=256,
            hidden_dim=384,
            attention_dim=256,
            region_dim=384,
            dropout=0.3,
        )
    )


def measure_checkpoints(num_images: int = 16, default_run: bool = False) -> Row:
    """LSTM + Bahdanau, 5 captions an image, the machine's best precision; one save for each 50 steps.

    Args:
        default_run: the decoder of the default run (hidden 384); else P1's (hidden 512).
    """
    training = Training(default_decoder() if default_run else build(), num_images)
    plain, stalls, extra = list[float](), list[float](), list[float]()
    with temporary_keeper() as keeper:
        training.step()  # the optimizer has its state from here on
        training.save(keeper, 1, wait=True)  # starts the writer
        for pair in range(NUM_PAIRS):
            before = [training.step() for _ in range(WINDOW)]
            stalls.append(training.save(keeper, pair + 2))
            beside = [training.step() for _ in range(WINDOW)]
            while keeper.in_flight is not None and not keeper.is_due(0):
                beside.append(training.step())
            after = [training.step() for _ in range(WINDOW)]
            around = statistics.mean(before + after)  # what these steps take now, on a machine whose speed drifts
            extra.append(stalls[-1] + sum(step - around for step in beside))
            plain += before + after
        keeper.close()
        written = sum(path.stat().st_size for path in next(keeper.folder.glob("step-*")).iterdir())
    step_s = statistics.median(plain)
    size = f"{written / 1e6:.0f} MB"
    return {
        "work": f"P5 one checkpoint of {size} every {INTERVAL} steps of {num_images} images, {training.dtype}",
        "times": {
            kind: {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values)}
            for kind, values in {"a checkpoint, wait and slower steps": extra, "wait": stalls, "step": plain}.items()
        },
        "ratios": {
            "share of time spent on checkpoints": statistics.mean(extra) / (INTERVAL * step_s),
            "longest stall / median step": max(stalls) / step_s,
        },
        "check": {
            "share by the median save": statistics.median(extra) / (INTERVAL * step_s),
            "standard error of the share": statistics.stdev(extra) / NUM_PAIRS**0.5 / (INTERVAL * step_s),
        },
    }


def measure_default_checkpoints() -> Row:
    return measure_checkpoints(32, default_run=True)


if __name__ == "__main__":
    show(measure_checkpoints())
    show(measure_default_checkpoints())
