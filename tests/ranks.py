"""What tests/test_distributed.py runs under torchrun: trains the small task of tests/test_training.py.

    torchrun … tests/ranks.py <folder> [keep | kill <rank> <step>] [critical]

The main process writes <folder>/losses.json and <folder>/weights.safetensors.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from safetensors.torch import save_file  # noqa: E402
from test_checkpoints import settings as recovery  # noqa: E402
from test_training import build, run  # noqa: E402

from captioning.checkpoints import Checkpointer  # noqa: E402
from captioning.distributed import join_world  # noqa: E402


def kill_at(task, rank: int, step: int, marker: Path) -> None:
    """SIGKILL for one rank before a step; the first time only."""
    real = task.train_step

    def train_step(share, now, stop):
        if now == step and task.world.rank == rank and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(share, now, stop)

    task.train_step = train_step


CRITICAL = {"start_epoch": 3, "num_samples": 3, "rate_factor": 0.5, "cross_entropy_weight": 0.5}


def main(folder: Path, *words: str) -> None:
    fault = [word for word in words if word != "critical"]
    changes = {"dropout": 0.3 if fault else 0.0, "num_epochs": 4, "log_every_steps": 1}
    changes |= {"self_critical": CRITICAL} if "critical" in words else {}
    losses: dict[int, float] = {}
    with join_world() as world:
        own = folder / f"rank{world.rank}"
        own.mkdir(parents=True, exist_ok=True)

        def log(step: int, metrics: dict[str, float]) -> None:
            for name in {"train/loss", "train/reward"} & metrics.keys():  # a step logs one of them
                losses[step] = metrics[name]

        task, journal = build(own, world, log, **changes)
        if fault[1:]:
            kill_at(task, int(fault[1]), int(fault[2]), folder / "killed")
        keeper = None
        if world.is_main and fault:
            lock = os.open(os.devnull, os.O_RDWR)
            keeper = Checkpointer(folder / "checkpoints", "print", recovery(checkpoint_steps=2), lock)
        run(task, journal, keeper, world)
        parts = world.gather(f"rank {world.rank}".encode() * world.rank)
        assert parts == [f"rank {r}".encode() * r for r in range(world.num_processes)]
        assert world.share({"from": world.rank}) == {"from": 0}
        if world.is_main:
            save_file(task.decoder.state_dict(), folder / "weights.safetensors")
            record = {"losses": losses, "history": task.history, "num_processes": world.num_processes}
            (folder / "losses.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
