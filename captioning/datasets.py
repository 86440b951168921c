"""What training and search read: mapped features, and batches of images with all their captions.

The order of samples is a pure function of (seed, epoch), the view of each of (seed, epoch, image_id), so a run can be
repeated and resumed exactly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from captioning.annotations import Annotation
from captioning.augmentation import survives_mirror
from captioning.distributed import ALONE, World
from captioning.errors import CapstanError
from captioning.feature_files import FeatureFile, open_features
from captioning.views import MIRROR
from captioning.vocabulary import Vocabulary


class FeatureStore:
    """Features of many images, mapped from an encoder's folder of feature files and never read whole."""

    def __init__(self, folder: Path, images: Sequence[Any], verify: bool = False) -> None:
        """`images` have `image_id`, `shard` and `key`; their rows are found once, here.

        Args:
            verify: read every file used and compare its digest first (about 9 GB/s).

        Raises:
            CapstanError: a file is missing or damaged, files have different views, or an image has no features.
        """
        self._files: dict[str, FeatureFile] = {}
        rows: dict[str, dict[str, int]] = {}
        for shard in sorted({image.shard for image in images}):
            path = folder / f"{shard}.h5"
            if not path.exists():
                raise CapstanError(f"{path} is missing: run `dvc repro features` (or `dvc pull {folder}`)")
            self._files[shard] = open_features(path, verify)
            rows[shard] = {key: row for row, key in enumerate(self._files[shard].keys)}
        absent = [image.image_id for image in images if image.key not in rows[image.shard]]
        if absent:
            raise CapstanError(f"{folder} has no features for {len(absent)} images ({absent[0]}, …): run `dvc repro`")
        # Parts of plain arrays, made once: of a memmap each would be a new memmap, ten times as slow to make.
        arrays = {shard: np.asarray(file.features) for shard, file in self._files.items()}
        self._images = [arrays[image.shard][rows[image.shard][image.key]] for image in images]
        self._plain = [image[0] for image in self._images]
        first = next(iter(self._files.values()))
        self.encoder, self.views = first.encoder, first.views
        others = [shard for shard, file in self._files.items() if file.views != self.views]
        if others:
            raise CapstanError(f"{folder / others[0]}.h5 has other views than the first file: run `dvc repro features`")

    def __len__(self) -> int:
        return len(self._images)

    @property
    def digests(self) -> dict[str, str]:
        """The stored digest of each file used, by shard."""
        return {shard: file.digest for shard, file in self._files.items()}

    def gather(self, indices: Sequence[int], views: Sequence[int] | None = None) -> Tensor:
        """Features of the images at these positions: (batch, num_regions, encoder_dim) float16.

        What computes with them widens them, on its own device: half the bytes to copy here and to a GPU.

        Args:
            views: of each image, a position in `self.views`; None: the plain view of all.
        """
        if views is None:
            blocks = [self._plain[i] for i in indices]
        else:
            blocks = [self._images[i][view] for i, view in zip(indices, views, strict=True)]
        num_regions, encoder_dim = self._plain[0].shape
        gathered = torch.empty(len(indices), num_regions, encoder_dim, dtype=torch.float16)
        np.concatenate(blocks, out=gathered.view(-1, encoder_dim).numpy())
        return gathered


@dataclass(frozen=True)
class Batch:
    """Images with their captions, arranged so that finished captions can leave a decoder's step.

    Images are sorted by their longest caption, captions of an image by length, both falling: at step t the captions
    that still run lie within the first `extents[t][0]` images and the first `extents[t][1]` captions of each.
    """

    features: Tensor  # (images, num_regions, encoder_dim), float16 from the cache
    inputs: Tensor  # (images, captions, steps) int64: bos and the words, then pad
    targets: Tensor  # (images, captions, steps) int64: the words and eos, then pad
    extents: list[tuple[int, int]]  # for each step
    running: list[int]  # for each step, its tokens: captions that still run
    kept: Tensor  # (num_tokens,) int64: places of real tokens in the steps' extents laid end to end
    places: Tensor  # (num_tokens,) int64: the same tokens' places in `targets`, flattened
    packed_targets: Tensor  # (num_tokens,) int64, in the order of `kept` and `places`

    @property
    def num_tokens(self) -> int:
        return self.packed_targets.numel()

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; `extents` stay plain numbers, so no step waits for the GPU."""
        if device.type == "cpu":
            return self
        names = ("features", "inputs", "targets", "kept", "places", "packed_targets")
        moved = {name: getattr(self, name).pin_memory().to(device, non_blocking=True) for name in names}
        return Batch(extents=self.extents, running=self.running, **moved)

    def tokens(self, steps: slice) -> slice:
        """Where the tokens of these steps lie among all, which run step by step."""
        start = sum(self.running[: steps.start])
        return slice(start, start + sum(self.running[steps]))

    def places_within(self, steps: slice) -> Tensor:
        """Places of these steps' tokens in what only these steps, and the captions that run at the first, make up:
        (images, captions, steps), flattened."""
        places, (_, captions, num_steps) = self.places[self.tokens(steps)], self.targets.shape
        if (steps.start, steps.stop) == (0, num_steps):
            return places
        caption, step = places // num_steps, places % num_steps - steps.start
        caption = caption // captions * self.extents[steps.start][1] + caption % captions
        return caption * (steps.stop - steps.start) + step


@dataclass(frozen=True)
class Share:
    """One process's images of a batch: `num_tokens` are the whole batch's, so that ranks' losses add up to its mean."""

    batch: Batch | None
    """None where the batch has fewer images than there are processes."""
    num_tokens: int


def collate(features: Tensor, captions: Sequence[Sequence[Sequence[int]]], vocabulary: type[Vocabulary]) -> Batch:
    """Builds a batch from features (images, num_regions, encoder_dim) and each image's captions as word ids."""
    ranked = [sorted(group, key=len, reverse=True) for group in captions]  # stable: equal lengths keep their order
    order = sorted(range(len(ranked)), key=lambda i: -len(ranked[i][0]))
    ranked = [ranked[i] for i in order]
    num_steps, width = len(ranked[0][0]) + 1, max(len(group) for group in ranked)
    inputs = torch.full((len(ranked), width, num_steps), vocabulary.pad_id)
    targets = inputs.clone()
    for i, group in enumerate(ranked):
        for c, words in enumerate(group):
            inputs[i, c, : len(words) + 1] = torch.tensor([vocabulary.bos_id, *words])
            targets[i, c, : len(words) + 1] = torch.tensor([*words, vocabulary.eos_id])
    return _lay_out(features[order], inputs, targets, vocabulary.pad_id)


def part_of(batch: Batch, images: slice) -> Batch:
    """Some of a batch's images, as a batch of their own: no wider and no longer than their captions."""
    if images.start == 0 and images.stop >= len(batch.features):
        return batch
    running = batch.targets[images] != Vocabulary.pad_id  # (images, captions, steps)
    width, num_steps = int(running[..., 0].sum(1).max()), int(running[:, 0].sum(1).max())
    inputs, targets = (tensor[images, :width, :num_steps] for tensor in (batch.inputs, batch.targets))
    return _lay_out(batch.features[images], inputs.contiguous(), targets.contiguous(), Vocabulary.pad_id)


def pieces(share: Share, parts: Sequence[slice]) -> list[Share]:
    """A share in parts of its images, each with the whole batch's `num_tokens`; parts beyond its end are left out."""
    batch = share.batch
    if batch is None:
        return [share]
    inside = [part for part in parts if part.start < len(batch.features)]
    return [replace(share, batch=part_of(batch, part)) for part in inside]


def largest(shares: Sequence[Share]) -> int:
    """Images in the largest of them; 1 where none has any."""
    return max([1, *(len(share.batch.features) for share in shares if share.batch is not None)])


def _lay_out(features: Tensor, inputs: Tensor, targets: Tensor, pad_id: int) -> Batch:
    """A batch of sorted images with sorted captions."""
    running = targets != pad_id  # (images, captions, steps)
    layout = torch.arange(targets.numel()).view_as(targets)
    extents, numbers, kept, places, start = [], [], [], [], 0
    for step in range(targets.shape[-1]):
        rows, columns = int(running[:, 0, step].sum()), int(running[..., step].any(0).sum())
        extent = running[:rows, :columns, step].reshape(-1)
        kept.append(extent.nonzero().squeeze(1) + start)
        places.append(layout[:rows, :columns, step].reshape(-1)[extent])
        extents.append((rows, columns))
        numbers.append(len(kept[-1]))
        start += rows * columns
    found = torch.cat(places)
    return Batch(features, inputs, targets, extents, numbers, torch.cat(kept), found, targets.view(-1)[found])


def epoch_order(num_samples: int, seed: int, epoch: int) -> list[int]:
    """The order of samples in an epoch: a permutation that depends on nothing but these numbers."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples).tolist()


def epoch_view(num_views: int, seed: int, epoch: int, image_id: str) -> int:
    """The view of an image in an epoch: depends on nothing but these, so on no other image, batch or process."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{epoch}/{image_id}".encode()) % num_views


class CaptionBatches:
    """Batches of a split for teacher forcing. One thread gathers the next batch while the current one is used."""

    def __init__(self, store: FeatureStore, annotations: list[Annotation], vocabulary: Vocabulary, size: int) -> None:
        """`store` holds the annotations' images in the same order. Captions are cut to `vocabulary.max_length`."""
        self.store, self.size, self.vocabulary = store, size, vocabulary
        limit = vocabulary.max_length
        self.captions = [[vocabulary.encode(caption)[:limit] for caption in a.captions] for a in annotations]
        self.image_ids = [a.image_id for a in annotations]
        self._may_mirror = [survives_mirror(a.captions) for a in annotations]

    def __len__(self) -> int:
        return -(-len(self.captions) // self.size)

    def draw_views(self, seed: int, epoch: int) -> list[int] | None:
        """What `epoch` wants as `views` in training; None where only one is cached."""
        every = range(len(self.store.views))
        if len(every) == 1:
            return None
        upright = [i for i in every if MIRROR not in self.store.views[i]]
        choices = [every if mirrors else upright for mirrors in self._may_mirror]
        pairs = zip(choices, self.image_ids, strict=True)
        return [choice[epoch_view(len(choice), seed, epoch, image_id)] for choice, image_id in pairs]

    def strength(self, epoch: int, batch: int) -> float | None:
        """Of the augmentation in a batch of training; None where there is none."""
        return None

    def _load(self, indices: list[int], world: World, views: Sequence[int] | None) -> Share:
        mine = [indices[i] for i in world.part(len(indices))]
        num_tokens = sum(len(caption) + 1 for i in indices for caption in self.captions[i])  # + 1: eos
        if not mine:
            return Share(None, num_tokens)
        captions = [self.captions[i] for i in mine]
        features = self.store.gather(mine, None if views is None else [views[i] for i in mine])
        return Share(collate(features, captions, type(self.vocabulary)), num_tokens)

    def epoch(
        self,
        order: Sequence[int] | None = None,
        first_batch: int = 0,
        world: World = ALONE,
        views: Sequence[int] | None = None,
    ) -> Iterator[Share]:
        """Yields this process's share of each batch of an epoch, from number `first_batch` on.

        Args:
            order: of the samples, the same for any number of processes; None: the annotations' own.
            views: of each sample, as `draw_views` gives them; None: the plain ones.
        """
        order = range(len(self.captions)) if order is None else order
        parts = [list(order[i : i + self.size]) for i in range(first_batch * self.size, len(order), self.size)]
        with ThreadPoolExecutor(1) as pool:
            ahead: deque[Future[Share]] = deque()
            for part in parts:
                ahead.append(pool.submit(self._load, part, world, views))
                if len(ahead) > 1:
                    yield ahead.popleft().result()
            while ahead:  # nothing at all where a run goes on at an epoch's very end
                yield ahead.popleft().result()
