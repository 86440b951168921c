"""P5: what checkpoints cost: the same training steps in turn with and without a save, and the longest wait of a step.

python -m benchmarks.checkpointing
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.__main__ import ENCODER_DIM, VOCABULARY_SIZE, build, synthetic_batch
from captioning.checkpoints import Checkpointer
from captioning.decoders import DecoderConfig, build_decoder
from captioning.distributed import ALONE
from captioning.optimization import Stepper, build_adamw
from captioning.params import RecoveryParams
from captioning.precision import autocast, choose_device, choose_precision

INTERVAL = 50
NUM_PAIRS = 4


def measure_checkpoints(num_images: int = 16, default_run: bool = False) -> dict[str, Any]:
    """LSTM + Bahdanau, 5 captions an image, the machine's best precision; one save for each 50 steps.

    Args:
        default_run: the decoder of the default run (hidden 384); else P1's (hidden 512).
    """
    device = choose_device()
    dtype = choose_precision("auto", device)
    batch, decoder = synthetic_batch(num_images).to(device), build().to(device)
    if default_run:
        config = DecoderConfig("lstm", "bahdanau", VOCABULARY_SIZE, ENCODER_DIM, 256, 384, 256, 384, 0.3)
        decoder = build_decoder(config).to(device)
    stepper = Stepper(build_adamw(list(decoder.named_parameters()), 1e-4, 0.01, (0.9, 0.999)), 5.0, dtype, ALONE)
    best = {name: tensor.cpu().clone() for name, tensor in decoder.state_dict().items()}

    def step() -> None:
        with autocast(device, dtype):
            logits = decoder(batch)
        stepper.step(torch.nn.functional.cross_entropy(logits.float(), batch.packed_targets), 1.0)

    def state() -> dict[str, Any]:
        return {"decoder": decoder.state_dict(), "stepper": stepper.state_dict(), "best": best}

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        settings = RecoveryParams(
            checkpoint_steps=INTERVAL, checkpoint_minutes=1e9, keep_checkpoints=2, max_restarts=0,
            keep_work_days=1, min_free_gb=0,
        )  # fmt: skip
        keeper = Checkpointer(Path(folder), "benchmark", settings, os.open(os.devnull, os.O_RDWR))
        keeper.save(1, 0, state(), [], wait=True)
        for _ in range(3):
            step()
        times: dict[str, list[float]] = {"with": [], "without": []}
        stalls, steps = [], []
        for pair in range(NUM_PAIRS):
            for kind in ("without", "with"):
                started = time.perf_counter()
                for number in range(INTERVAL):
                    before = time.perf_counter()
                    step()
                    after = time.perf_counter()
                    if kind == "with":
                        if number == 0:
                            keeper.ask()
                        if keeper.is_due(number):
                            keeper.save(100 * pair + number + 2, 0, state(), [])
                        stalls.append(time.perf_counter() - after)
                    else:
                        steps.append(after - before)
                times[kind].append(time.perf_counter() - started)
        keeper.close()
        written = sum(path.stat().st_size for path in next(Path(folder).glob("step-*")).iterdir())
    step_s = statistics.median(steps)
    extra = statistics.median(a - b for a, b in zip(times["with"], times["without"], strict=True))
    return {
        "work": f"P5 {INTERVAL} steps of {num_images} images with one checkpoint of {written / 1e6:.0f} MB, {dtype}",
        "times": {
            kind: {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values)}
            for kind, values in times.items()
        },
        "ratios": {
            "share of time spent on checkpoints": extra / statistics.median(times["without"]),
            "longest stall / median step": max(stalls) / step_s,
        },
        "check": {"longest stall in ms": max(stalls) * 1000, "step in ms": step_s * 1000},
    }


if __name__ == "__main__":
    print(json.dumps([measure_checkpoints(), measure_checkpoints(32, default_run=True)], indent=1))
