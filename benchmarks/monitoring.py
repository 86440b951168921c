"""What watching costs: `python -m benchmarks.monitoring`. O(10 s).

Prints the processor time of a sample, its share of one core at the interval in params.yaml, and the time that `count`
and `waiting` add to a training step.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from captioning import monitoring, probes
from captioning.params import MonitoringParams, load_params

NUM_SAMPLES, NUM_STEPS, NUM_REPEATS = 300, 100_000, 5


def sample_seconds(settings: MonitoringParams, folder: Path) -> float:
    """Processor seconds of one sample: reading the machine, writing the line, comparing with the thresholds."""
    health = monitoring.Health("bench", settings, folder)
    machine = probes.Machine(folder, health.complain)
    health.sample(machine.read())  # warm
    started = time.process_time()
    for _ in range(NUM_SAMPLES):
        health.sample(machine.read())
    return (time.process_time() - started) / NUM_SAMPLES


def step_seconds(step: Callable[[], None]) -> float:
    """The least of several means, in seconds: what the call itself costs."""

    def once() -> float:
        started = time.perf_counter()
        for _ in range(NUM_STEPS):
            step()
        return (time.perf_counter() - started) / NUM_STEPS

    return min(once() for _ in range(NUM_REPEATS))


def step() -> None:
    with monitoring.waiting():
        pass
    monitoring.count(images=32, tokens=900)


def main() -> None:
    settings = load_params().monitoring
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = sample_seconds(settings, folder)
        share = 100 * seconds / settings.interval_s
        print(f"sample                {1000 * seconds:8.3f} ms of processor time")
        print(f"at {settings.interval_s:g} s               {share:8.4f} % of a core")
        print(f"step, nothing watches {1e9 * step_seconds(step):8.0f} ns (one waiting, one count)")
        with monitoring.watch("bench", settings, folder):
            print(f"step, watched         {1e9 * step_seconds(step):8.0f} ns")


if __name__ == "__main__":
    main()
