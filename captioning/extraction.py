"""Feature extraction: shards → encoder → feature files, in whole batches with JPEG decoding in worker processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from captioning import monitoring, storage
from captioning.distributed import ALONE, World
from captioning.encoders import Encoder, Transform
from captioning.errors import CapstanError
from captioning.feature_files import open_features, write_features
from captioning.images import decode_image
from captioning.orphans import die_with_parent
from captioning.precision import autocast, choose_device, choose_precision
from captioning.progress import Progress
from captioning.shards import iterate_shard


class ShardImages(IterableDataset):
    """Batches of decoded images, shard after shard, never mixing two shards in one batch.

    With several workers each decodes every n-th batch, so that `DataLoader`, which asks the workers in turn,
    returns the batches in the shards' order.
    """

    def __init__(self, shards: list[Path], transform: Transform, batch_size: int) -> None:
        self.shards, self.transform, self.batch_size = shards, transform, batch_size

    def __iter__(self) -> Iterator[tuple[int, list[str], np.ndarray]]:
        """Yields (index of the shard, keys, (batch, image_px, image_px, 3) uint8)."""
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        turn = 0
        for index, shard in enumerate(self.shards):
            batch: list[tuple[str, bytes]] = []
            for key, image, _ in iterate_shard(shard):
                batch.append((key, image))
                if len(batch) == self.batch_size:
                    if turn % num_workers == worker:
                        yield self._decode(index, batch)
                    turn, batch = turn + 1, []
            if batch:
                if turn % num_workers == worker:
                    yield self._decode(index, batch)
                turn += 1

    def _decode(self, index: int, batch: list[tuple[str, bytes]]) -> tuple[int, list[str], np.ndarray]:
        images = [self.transform.resize(decode_image(image)) for _, image in batch]
        return index, [key for key, _ in batch], np.stack(images)


def _leave_signals_to_parent(_: int) -> None:
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _identity(item: Any) -> Any:
    return item


def missing_shards(encoder: Encoder, shards: list[Path], out: Path) -> list[Path]:
    """The shards that have no good file in `out` yet; damaged files are set aside. Says what is there."""
    todo = [shard for shard in shards if not _is_done(out / f"{shard.stem}.h5", encoder, shard)]
    if len(todo) < len(shards):
        print(f"resumed: {len(shards) - len(todo)} of {len(shards)} shards verified, {len(todo)} left", flush=True)
    return todo


def extract_features(
    encoder: Encoder,
    todo: list[Path],
    out: Path,
    batch_size: int,
    num_workers: int,
    precision: str,
    world: World = ALONE,
) -> None:
    """Writes `out/<shard>.h5` for each shard; `todo` is this process's share, and the main one shows its own pace.

    Raises:
        CapstanError: a shard without images.
    """
    device = choose_device()
    encoder = encoder.to(device)
    dataset = ShardImages(todo, encoder.transform, batch_size)
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_identity,
        generator=torch.Generator(),  # else it draws from the global one
        worker_init_fn=_leave_signals_to_parent,
    )
    dtype = choose_precision(precision, device)
    current, keys, chunks = 0, [], []  # type: int, list[str], list[np.ndarray]
    title = f"features {encoder.name}" + (f" (1 of {world.num_processes} processes)" if world.num_processes > 1 else "")
    with Progress(title, unit="image", shown=world.is_main) as progress, torch.inference_mode():
        batches = iter(loader)
        while True:
            with monitoring.waiting():
                loaded = next(batches, None)
            if loaded is None:
                break
            index, batch_keys, pixels = loaded
            if index != current:
                _write(out, todo[current], keys, chunks, encoder)
                current, keys, chunks = index, [], []
            chunks.append(_encode(encoder, torch.from_numpy(pixels).to(device), dtype))
            keys += batch_keys
            progress.update(len(batch_keys))
            monitoring.count(images=len(batch_keys) * world.num_processes)
    if todo:
        _write(out, todo[current], keys, chunks, encoder)


def _encode(encoder: Encoder, pixels: Tensor, dtype: torch.dtype) -> np.ndarray:
    with autocast(pixels.device, dtype):
        return encoder(pixels).to(torch.float16).cpu().numpy()


def _write(out: Path, shard: Path, keys: list[str], chunks: list[np.ndarray], encoder: Encoder) -> None:
    if not chunks:
        raise CapstanError(f"{shard} holds no image: run `dvc repro download`")
    stacked = np.concatenate(chunks)
    if not np.isfinite(stacked).all():
        raise CapstanError(f"{shard}: {encoder.name} gave features beyond float16; use features.precision: fp32")
    write_features(out / f"{shard.stem}.h5", keys, stacked, encoder.describe(), storage.digest_file(shard))


def _is_done(path: Path, encoder: Encoder, shard: Path) -> bool:
    if not path.exists():
        return False
    try:
        found = open_features(path, verify=True)
        return found.encoder == encoder.describe() and found.shard_digest == storage.digest_file(shard)
    except CapstanError:
        storage.set_aside(path)
        return False
