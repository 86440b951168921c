"""Live mode: images from shards, augmented, and encoded at each step, so that the encoder can be fine-tuned.

`ImageStore` gives pixels where `FeatureStore` gives features, and `LiveCaptioner` is a decoder of pixels; so training,
validation and search run as they do on cached features.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from captioning.annotations import Annotation
from captioning.augmentation import survives_mirror
from captioning.datasets import Batch, CaptionBatches, epoch_order
from captioning.decoders import Decoder
from captioning.decoders.base import Memory, State, Step
from captioning.encoders import Encoder
from captioning.errors import CapstanError
from captioning.images import decode_image
from captioning.precision import autocast
from captioning.shards import shard_digests, verify_shards
from captioning.vocabulary import Vocabulary

if TYPE_CHECKING:
    from captioning.augmentation import Augmenter

Draw = tuple[int, float]
"""What decides an image's augmentation: the epoch, and the strength at its step."""

MAX_THREADS = 8
"""That decode: more than a GPU's batches wait for."""


class ImageStore:
    """JPEGs of many images, found once in their shards and read when asked for."""

    views = ("plain",)

    def __init__(
        self, folder: Path, images: Sequence[Any], encoder: Encoder, augmenter: Augmenter | None = None
    ) -> None:
        """`images` have `image_id`, `shard` and `key`, and `captions` where an augmenter is given.

        Raises:
            CapstanError: a shard is missing, or lacks an image.
            DamagedError: a shard has other bytes than were written.
        """
        shards = sorted({image.shard for image in images})
        verify_shards(folder, shards)
        self.digests, self.encoder = shard_digests(folder, shards), encoder.describe()
        self.transform, self.augmenter = encoder.transform, augmenter
        places = {shard: _find_jpegs(folder / f"{shard}.tar") for shard in shards}
        absent = [image.image_id for image in images if image.key not in places[image.shard]]
        if absent:
            raise CapstanError(f"{folder} lacks {len(absent)} images ({absent[0]}, …): run `dvc repro`")
        files = {shard: os.open(folder / f"{shard}.tar", os.O_RDONLY) for shard in shards}
        self._places = [(files[image.shard], *places[image.shard][image.key]) for image in images]
        self._image_ids = [image.image_id for image in images]
        self._may_flip = [augmenter is not None and survives_mirror(image.captions) for image in images]
        self._pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))

    def __len__(self) -> int:
        return len(self._places)

    def gather(self, indices: Sequence[int], draws: Sequence[Draw] | None = None) -> Tensor:
        """(batch, image_px, image_px, 3) uint8 of the images at these positions; `draws`: None gives them plain."""
        found = self._pool.map(self._load, indices, draws or [None] * len(indices))
        return torch.from_numpy(np.stack(list(found)))

    def _load(self, index: int, draw: Draw | None) -> np.ndarray:
        file, offset, size = self._places[index]
        image = decode_image(os.pread(file, size, offset))
        if draw is not None and self.augmenter:
            epoch, strength = draw
            image = self.augmenter(image, epoch, self._image_ids[index], strength, self._may_flip[index])
        return self.transform.resize(image)


def _find_jpegs(shard: Path) -> dict[str, tuple[int, int]]:
    """Where each key's JPEG lies in a shard: (offset, size)."""
    with tarfile.open(shard, "r:") as tar:
        return {
            info.name.removesuffix(".jpg"): (info.offset_data, info.size) for info in tar if info.name.endswith(".jpg")
        }


class LiveBatches(CaptionBatches):
    """Batches of pixels with their captions."""

    store: ImageStore  # type: ignore[assignment]

    def __init__(self, store: ImageStore, annotations: list[Annotation], vocabulary: Vocabulary, size: int) -> None:
        super().__init__(store, annotations, vocabulary, size)  # type: ignore[arg-type]

    def draw_views(self, seed: int, epoch: int) -> list[Draw] | None:  # type: ignore[override]
        """The augmentation of each sample in an epoch of `epoch_order`: a pure function of (seed, epoch)."""
        augmenter = self.store.augmenter
        if augmenter is None:
            return None
        draws: list[Draw] = [(epoch, 0.0)] * len(self.captions)
        for place, sample in enumerate(epoch_order(len(self.captions), seed, epoch)):
            draws[sample] = epoch, augmenter.strength(epoch * len(self) + place // self.size)
        return draws

    def strength(self, epoch: int, batch: int) -> float | None:
        augmenter = self.store.augmenter
        return None if augmenter is None else augmenter.strength(epoch * len(self) + batch)


class LiveCaptioner(Decoder):
    """An encoder and a decoder as one decoder whose `features` are pixels (images, image_px, image_px, 3) uint8."""

    def __init__(
        self, encoder: Encoder, decoder: Decoder, dtype: torch.dtype, stages: Sequence[str] = (), every: int = 0
    ) -> None:
        """`stages` of the encoder learn, as `open_stages` says; it computes in `dtype`."""
        super().__init__()
        self.encoder, self.decoder, self.config = encoder, decoder, decoder.config
        self.dtype, self.stages, self.every = dtype, tuple(stages), every

    def open_stages(self, epoch: int) -> tuple[str, ...]:
        """The stages that learn in an epoch (from 0): with gradual unfreezing (Howard and Ruder 2018, section 3.3) the
        last one from epoch `every` on, one more each `every` epochs."""
        count = len(self.stages) if not self.every else min(epoch // self.every, len(self.stages))
        return self.stages[len(self.stages) - count :]

    def begin_epoch(self, epoch: int) -> None:
        self.encoder.unfreeze(self.open_stages(epoch))

    def trainable(self) -> dict[str, list[tuple[str, Tensor]]]:
        """Named parameters by stage, for the optimizer: a stage that does not learn yet has its groups, too."""
        found: dict[str, list[tuple[str, Tensor]]] = {stage: [] for stage in self.stages}
        for name, parameter in self.encoder.named_parameters():
            if (stage := self.encoder.stage_of(name)) in found:
                found[stage].append((f"encoder.{name}", parameter))
        return found

    def encode(self, pixels: Tensor) -> Tensor:
        """(images, num_regions, encoder_dim) float32."""
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.encoder.parameters())
        with torch.set_grad_enabled(learns), autocast(pixels.device, self.dtype):
            features: Tensor = self.encoder(pixels).float()
        return features

    def read(self, batch: Batch) -> Tensor:
        return self.decoder.read(replace(batch, features=self.encode(batch.features)))

    def read_with_coverage(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.decoder.read_with_coverage(replace(batch, features=self.encode(batch.features)))

    @property
    def output(self) -> nn.Module:  # type: ignore[override]
        return self.decoder.output

    def parts_to_compile(self) -> list[tuple[nn.Module, str, bool]]:
        return [(self.encoder, "forward", False), *self.decoder.parts_to_compile()]

    @property
    def checkpointed(self) -> bool:  # type: ignore[override]
        return self.decoder.checkpointed

    @checkpointed.setter
    def checkpointed(self, value: bool) -> None:
        self.encoder.checkpointed = self.decoder.checkpointed = value

    def remember(self, features: Tensor) -> tuple[Memory, State]:
        return self.decoder.remember(self.encode(features))

    def step(self, memory: Memory, state: State, token_ids: Tensor) -> Step:
        return self.decoder.step(memory, state, token_ids)
