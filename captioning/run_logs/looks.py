"""What a run's log holds besides the journal's metrics: samples of what is learnt, and measurements.

Measurements differ from run to run, so they go into no checkpoint and into nothing that DVC tracks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captioning import monitoring

if TYPE_CHECKING:
    from captioning.logging_params import LoggingParams
    from captioning.training import DecoderTask

NUM_BINS = 64
MEASURED = ("images_per_s", "tokens_per_s", "loader_wait_share", "cpu_percent", "rss", "ram_used", "disk_read_per_s")
MEASURED_GPU = ("util", "memory_used", "temperature", "power_w")


class Looks:
    """Called with each new entry's metrics, before the run goes on; changes nothing and draws no random number."""

    def __init__(self, task: DecoderTask, settings: LoggingParams) -> None:
        self.task, self.settings = task, settings
        self._seen: float | None = None

    def __call__(self, metrics: dict[str, float]) -> dict[str, Any]:
        found: dict[str, Any] = {"machine": self._measure()}
        if any(name.startswith("val/") for name in metrics):  # an epoch has ended
            every, epoch = self.settings.histograms_every_epochs, len(self.task.history) + 1
            found["captions"] = self._samples()
            found["histograms"] = count_parameters(self.task.decoder) if every and epoch % every == 0 else {}
        return {name: values for name, values in found.items() if values}

    def _measure(self) -> dict[str, float]:
        """The watch's last sample, where there is a new one: at most `monitoring.interval_s` old."""
        sample = monitoring.latest()
        if sample is None or sample["elapsed_s"] == self._seen:
            return {}
        self._seen = sample["elapsed_s"]
        found = {name: sample.get(name) for name in MEASURED}
        for number, gpu in enumerate(sample.get("gpu", [])):
            found |= {f"gpu{number}_{name}": gpu[name] for name in MEASURED_GPU}
        return {name: value for name, value in found.items() if value is not None}

    def _samples(self) -> list[dict[str, Any]]:
        """What validation just said of some images, spread over the split."""
        cider, num_images = self.task.val_cider, len(self.task.val.image_ids)
        count = min(self.settings.num_sample_captions, num_images)
        chosen = [i * num_images // count for i in range(count)]
        return [
            {"image_id": self.task.val.image_ids[i], "caption": cider.captions[i], "references": cider.references[i]}
            for i in chosen
        ]


def count_parameters(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """A histogram of each parameter that learns: `counts` of NUM_BINS equal bins between `low` and `high`."""
    found = {name: count(values) for name, values in model.named_parameters() if values.requires_grad}
    return {name: histogram for name, histogram in found.items() if histogram is not None}


def count(values: Tensor) -> dict[str, Any] | None:
    """None where no number is finite."""
    flat = values.detach().reshape(-1).float().cpu()  # on a GPU histc is not deterministic, and torch refuses it
    if len(flat) and not math.isfinite(sum(bound.item() for bound in flat.aminmax())):  # cheaper than to ask each
        flat = flat[flat.isfinite()]
    if not len(flat):
        return None
    low, high = (bound.item() for bound in flat.aminmax())
    if low == high:
        low, high = low - 0.5, high + 0.5
    return {
        "low": low,
        "high": high,
        "counts": torch.histc(flat, NUM_BINS, low, high).int().tolist(),
        "sum": flat.sum().item(),
        "sum_squares": flat.dot(flat).item(),
    }
