"""`logging` in params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from captioning.param_types import Count, Section


class LoggingParams(Section):
    """Where a training run is logged besides DVCLive. Changes no result, so it is no dep of any stage."""

    wandb: Literal["disabled", "offline", "online"]
    """Weights & Biases. `offline`: into a folder that `wandb sync` sends later. `online` asks for `wandb login` or
    `$WANDB_API_KEY`."""
    wandb_project: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")]
    tensorboard: bool
    histograms_every_epochs: Count
    """Histograms of the parameters that learn, after each so many epochs; 0: none."""
    num_sample_captions: Count
    """Validation images whose captions are logged after each epoch."""

    @property
    def sinks(self) -> list[str]:
        """What is on, by the name of its package."""
        return ["wandb"] * (self.wandb != "disabled") + ["tensorboard"] * self.tensorboard
