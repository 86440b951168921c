"""Learning-rate schedules: factors on the base rate as functions of the optimizer step."""

from __future__ import annotations

import math


def cosine_with_warmup(step: int, warmup_steps: int, num_steps: int) -> float:
    """Linear from 0 to 1 over `warmup_steps`, then half a cosine down to 0 at `num_steps` (Loshchilov & Hutter 2017,
    equation 5, without restarts). `step` counts from 0; the first step already moves."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
