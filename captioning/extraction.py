"""Feature extraction: shards → encoder → feature files. JPEGs are decoded where the network leaves time for it.

On a CPU each core decodes and encodes batches of its own: threads that share one product wait for each other, and hand
pixels from cache to cache. For a GPU worker processes decode ahead.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from captioning import monitoring, storage
from captioning.distributed import ALONE, World
from captioning.encoders import Encoder, Transform, fuse_encoder
from captioning.errors import CapstanError
from captioning.feature_files import open_features, write_features
from captioning.images import decode_image
from captioning.orphans import die_with_parent
from captioning.precision import autocast, can_fuse, choose_device, choose_precision, keep_memory
from captioning.progress import Progress
from captioning.shards import iterate_shard

CPU_BATCH_SIZE = 8
"""More images at once make a CPU no faster, and their activations leave its cache."""
BATCHES_AHEAD = 64
"""For a CPU's cores to work on while a shard's features are written. Small: only JPEGs and features wait."""
INFINITE = 0x7C00
"""The bits of float16's infinity; those of NaN are above, those of all numbers below."""

Batch = list[tuple[str, bytes]]
Encoded = tuple[int, list[str], np.ndarray]
"""(index of the shard, keys, (batch, num_regions, encoder_dim) float16)"""


def read_batches(shards: list[Path], batch_size: int) -> Iterator[tuple[int, Batch]]:
    """(index of the shard, keys and JPEGs), shard after shard, never mixing two shards in one batch.

    Raises:
        CapstanError: a shard is damaged, or has no images.
    """
    for index, shard in enumerate(shards):
        samples, is_empty = iterate_shard(shard), True
        while batch := [(key, jpeg) for key, jpeg, _ in islice(samples, batch_size)]:
            is_empty = False
            yield index, batch
        if is_empty:
            raise CapstanError(f"{shard} holds no image: run `dvc repro download`")


def decode(batch: Batch, transform: Transform) -> Tensor:
    """(batch, image_px, image_px, 3) uint8."""
    return torch.from_numpy(np.stack([transform.resize(decode_image(jpeg)) for _, jpeg in batch]))


class ShardImages(IterableDataset):
    """Decoded batches. With several workers each decodes every n-th, so that `DataLoader`, which asks the workers in
    turn, returns them in the shards' order."""

    def __init__(self, shards: list[Path], transform: Transform, batch_size: int) -> None:
        self.shards, self.transform, self.batch_size = shards, transform, batch_size

    def __iter__(self) -> Iterator[tuple[int, list[str], Tensor]]:
        """Yields (index of the shard, keys, (batch, image_px, image_px, 3) uint8)."""
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        for turn, (index, batch) in enumerate(read_batches(self.shards, self.batch_size)):
            if turn % num_workers == worker:
                yield index, [key for key, _ in batch], decode(batch, self.transform)


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
    dtype = choose_precision(precision, device)
    if device.type == "cpu":
        encoded = encode_on_cpu(encoder, todo, batch_size, dtype)
    else:
        encoded = _encode_on_gpu(encoder.to(device), todo, batch_size, num_workers, dtype)
    current, keys, chunks = 0, [], []  # type: int, list[str], list[np.ndarray]
    title = f"features {encoder.name}" + (f" (1 of {world.num_processes} processes)" if world.num_processes > 1 else "")
    with Progress(title, unit="image", shown=world.is_main) as progress, closing(encoded):
        for index, batch_keys, features in encoded:
            if index != current:
                _write(out, todo[current], keys, chunks, encoder)
                current, keys, chunks = index, [], []
            chunks.append(features)
            keys += batch_keys
            progress.update(len(batch_keys))
            monitoring.count(images=len(batch_keys) * world.num_processes)
    if todo:
        _write(out, todo[current], keys, chunks, encoder)


def encode_on_cpu(encoder: Encoder, shards: list[Path], batch_size: int, dtype: torch.dtype) -> Generator[Encoded]:
    """Encoded batches in the shards' order, computed by as many threads as torch would use for one."""
    keep_memory()
    batch_size, num_threads = min(batch_size, CPU_BATCH_SIZE), torch.get_num_threads()
    encode = _fused(encoder, batch_size, dtype)

    def work(index: int, batch: Batch) -> Encoded:
        with torch.inference_mode():
            features = encode(decode(batch, encoder.transform))
            return index, [key for key, _ in batch], features.to(torch.float16).numpy()

    waiting: deque[Future[Encoded]] = deque()
    pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for index, batch in read_batches(shards, batch_size):
            waiting.append(pool.submit(work, index, batch))
            if len(waiting) >= max(BATCHES_AHEAD, 2 * num_threads):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)


def _encode_on_gpu(
    encoder: Encoder, shards: list[Path], batch_size: int, num_workers: int, dtype: torch.dtype
) -> Generator[Encoded]:
    loader = DataLoader(
        ShardImages(shards, encoder.transform, batch_size),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_identity,
        generator=torch.Generator(),  # else it draws from the global one
        worker_init_fn=_leave_signals_to_parent,
    )
    encode, batches = _plain(encoder, dtype), iter(loader)
    device = next(encoder.parameters()).device
    while True:
        with monitoring.waiting():
            loaded = next(batches, None)
        if loaded is None:
            return
        index, keys, pixels = loaded
        with torch.inference_mode():
            yield index, keys, encode(pixels.to(device)).to(torch.float16).cpu().numpy()


def _fused(encoder: Encoder, batch_size: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    if can_fuse(dtype):
        try:
            return fuse_encoder(encoder, batch_size, dtype)
        except ValueError as error:
            print(f"{encoder.name} runs as it is, slower: {error}", flush=True)
    return _plain(encoder, dtype)


def _plain(encoder: Encoder, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def encode(pixels: Tensor) -> Tensor:
        with autocast(pixels.device, dtype):
            return encoder(pixels)

    return encode


def _write(out: Path, shard: Path, keys: list[str], chunks: list[np.ndarray], encoder: Encoder) -> None:
    stacked = np.concatenate(chunks)
    if (stacked.view(np.uint16) & INFINITE).max(initial=0) == INFINITE:
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
