"""What only a GPU can tell: determinism, resuming, number formats, checkpoints from device memory, and its speed.

    python -m benchmarks.gpu        # writes benchmarks/gpu/<device>-<date>.json

Runs on a CPU, too, for a trial of the script; the file then says so.
"""

from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpointing import measure_checkpoints, temporary_keeper
from benchmarks.gpu_speed import measure_speed
from benchmarks.measure import machine
from benchmarks.workload import build, synthetic_batch
from captioning.checkpoints import read_checkpoint
from captioning.distributed import ALONE
from captioning.optimization import Stepper, build_adamw, seed_step
from captioning.precision import DTYPES, autocast, choose_device
from captioning.training import seed_everything

NUM_STEPS = 40
FOLDER = Path(__file__).parent / "gpu"


class Run:
    """A decoder in training on one batch, with dropout."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        seed_everything(seed, deterministic=True)
        self.device, self.dtype = choose_device(), dtype
        self.batch = synthetic_batch(16).to(self.device)
        self.decoder = build().to(self.device)
        for module in self.decoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        optimizer = build_adamw([(list(self.decoder.named_parameters()), 1e-3)], 0.01, (0.9, 0.999))
        self.stepper = Stepper(optimizer, 5.0, dtype, ALONE)

    def steps(self, first: int, last: int) -> list[float]:
        """Makes steps `first` to `last` - 1; returns their losses."""
        losses = []
        for step in range(first, last):
            seed_step(1, step, 0)
            with autocast(self.device, self.dtype):
                logits = self.decoder(self.batch)
            loss = torch.nn.functional.cross_entropy(logits.float(), self.batch.packed_targets)
            losses.append(self.stepper.step(loss, 1.0)[0])
        return losses

    def state(self) -> dict[str, Any]:
        return {"decoder": self.decoder.state_dict(), "stepper": self.stepper.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.decoder.load_state_dict(state["decoder"])
        self.stepper.load_state_dict(state["stepper"])


def same_weights(one: Run, two: Run) -> bool:
    pairs = zip(one.decoder.state_dict().values(), two.decoder.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def check_determinism(dtype: torch.dtype) -> dict[str, bool]:
    """Twice the same, and the same again where the state went through a checkpoint's files in the middle."""
    first, second, resumed = (Run(dtype) for _ in range(3))
    first.steps(0, NUM_STEPS)
    second.steps(0, NUM_STEPS)
    resumed.steps(0, NUM_STEPS // 2)
    fresh = Run(dtype, seed=5)
    fresh.load(through_files(resumed.state()))
    fresh.steps(NUM_STEPS // 2, NUM_STEPS)
    return {"two runs": same_weights(first, second), "resumed": same_weights(first, fresh)}


def through_files(state: dict[str, Any]) -> dict[str, Any]:
    """Saves and loads a checkpoint, as training does."""
    with temporary_keeper() as keeper:
        assert keeper.save(1, 0, state, [], wait=True)
        found: dict[str, Any] = read_checkpoint(keeper.folder / "step-00000001", "benchmark").state
    return found


def main() -> None:
    device = choose_device()
    formats = {
        name: Run(dtype).steps(0, NUM_STEPS)
        for name, dtype in DTYPES.items()
        if device.type == "cuda" or name != "fp16"
    }
    result = {
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "machine": machine(),
        "same bits": {name: check_determinism(DTYPES[name]) for name in formats},
        "loss at the end, by number format": {name: losses[-1] for name, losses in formats.items()},
        "largest difference of a loss from fp32": {
            name: max(abs(a - b) for a, b in zip(losses, formats["fp32"], strict=True))
            for name, losses in formats.items()
        },
        "checkpoints": measure_checkpoints(),
        "speed": measure_speed(device),
    }
    FOLDER.mkdir(exist_ok=True)
    target = FOLDER / f"{str(result['device']).replace(' ', '-').lower()}-{result['date']}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
