"""Feature extraction: shards → encoder → feature files. JPEGs are decoded where the network leaves time for it, each
once for all its views.

On a CPU each core decodes and encodes batches of its own: threads that share one product wait for each other, and hand
pixels from cache to cache. For a GPU worker processes decode ahead.
"""

from __future__ import annotations

import os
import signal
import tarfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from captioning import monitoring, storage
from captioning.distributed import ALONE, World
from captioning.encoders import Encoder, Transform, fuse_encoder
from captioning.errors import CapstanError
from captioning.feature_files import open_features, writing_features
from captioning.images import decode_image
from captioning.memory import Fitting
from captioning.orphans import die_with_parent
from captioning.precision import autocast, can_fuse, choose_device, choose_precision, keep_memory
from captioning.progress import Progress
from captioning.shards import iterate_shard
from captioning.views import PLAIN, look

CPU_BATCH_SIZE = 8
"""More images at once make a CPU no faster, and their activations leave its cache."""
GPU_BATCH_SIZE = 256
"""What `features.batch_size: auto` tries first. More would be no faster."""
BATCHES_AHEAD = 64
"""For a CPU's cores to work on while a shard's features are written. Small: only JPEGs and features wait."""
INFINITE = 0x7C00
"""The bits of float16's infinity; those of NaN are above, those of all numbers below."""

Batch = list[tuple[str, bytes]]
Encoded = tuple[int, list[str], np.ndarray]
"""(index of the shard, keys, (batch, num_views, num_regions, encoder_dim) float16)"""


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


def count_images(shard: Path) -> int:
    """How many images a shard holds: reads the headers alone, a seventh of tarfile's time. Of a damaged shard any
    number, as `read_batches` refuses it."""
    count = 0
    with shard.open("rb") as file, suppress(ValueError):
        while (header := file.read(tarfile.BLOCKSIZE)).strip(b"\0"):
            size = int(header[124:135], 8)  # USTAR's field, octal
            file.seek(-(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, os.SEEK_CUR)
            count += header[:100].rstrip(b"\0").endswith(b".jpg")
    return count


def decode(batch: Batch, transform: Transform, views: Sequence[str] = (PLAIN,)) -> Tensor:
    """(batch × num_views, image_px, image_px, 3) uint8: image by image, of each image view by view."""
    images = (decode_image(jpeg) for _, jpeg in batch)
    return torch.from_numpy(np.stack([transform.resize(view) for image in images for view in look(image, views)]))


class ShardImages(IterableDataset):
    """Decoded batches. With several workers each decodes every n-th, so that `DataLoader`, which asks the workers in
    turn, returns them in the shards' order."""

    def __init__(self, shards: list[Path], transform: Transform, batch_size: int, views: Sequence[str]) -> None:
        self.shards, self.transform, self.batch_size, self.views = shards, transform, batch_size, views

    def __iter__(self) -> Iterator[tuple[int, list[str], Tensor]]:
        """Yields (index of the shard, keys, (batch × num_views, image_px, image_px, 3) uint8)."""
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        for turn, (index, batch) in enumerate(read_batches(self.shards, self.batch_size)):
            if turn % num_workers == worker:
                yield index, [key for key, _ in batch], decode(batch, self.transform, self.views)


def _leave_signals_to_parent(_: int) -> None:
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _identity(item: Any) -> Any:
    return item


def missing_shards(encoder: Encoder, shards: list[Path], out: Path, views: Sequence[str] = (PLAIN,)) -> list[Path]:
    """The shards that have no good file in `out` yet; damaged files are set aside. Says what is there."""
    todo = [shard for shard in shards if not _is_done(out / f"{shard.stem}.h5", encoder, shard, views)]
    if len(todo) < len(shards):
        print(f"resumed: {len(shards) - len(todo)} of {len(shards)} shards verified, {len(todo)} left", flush=True)
    return todo


def extract_features(
    encoder: Encoder,
    todo: list[Path],
    out: Path,
    batch_size: int | Literal["auto"],
    num_workers: int,
    precision: str,
    views: Sequence[str] = (PLAIN,),
    world: World = ALONE,
) -> None:
    """Writes `out/<shard>.h5` for each shard; `todo` is this process's share, and the main one shows its own pace.

    Args:
        batch_size: views of images that are encoded at once; halved where they do not fit into memory.

    Raises:
        CapstanError: a shard without images, or one image that does not fit into memory.
    """
    device = choose_device()
    dtype = choose_precision(precision, device)
    if device.type == "cpu":
        encoded = encode_on_cpu(encoder, todo, batch_size, dtype, views)
    else:
        encoded = _encode_on_gpu(encoder.to(device), todo, batch_size, num_workers, dtype, views)
    title = f"features {encoder.name}" + (f" (1 of {world.num_processes} processes)" if world.num_processes > 1 else "")
    with Progress(title, unit="image", shown=world.is_main) as progress, closing(encoded):

        def count(num_images: int) -> None:
            progress.update(num_images)
            monitoring.count(images=num_images * world.num_processes)

        for index, batches in groupby(encoded, key=itemgetter(0)):
            _write(out, todo[index], batches, encoder, views, count)


def encode_on_cpu(
    encoder: Encoder,
    shards: list[Path],
    batch_size: int | Literal["auto"],
    dtype: torch.dtype,
    views: Sequence[str] = (PLAIN,),
) -> Generator[Encoded]:
    """Encoded batches in the shards' order, computed by as many threads as torch would use for one."""
    keep_memory()
    num_rows = CPU_BATCH_SIZE if batch_size == "auto" else min(batch_size, CPU_BATCH_SIZE)
    fitting, num_threads = Fitting(num_rows, torch.device("cpu")), torch.get_num_threads()
    encode = _fused(encoder, num_rows, dtype)

    def work(index: int, batch: Batch) -> Encoded:
        features = encode_fitting(encode, decode(batch, encoder.transform, views), fitting)
        return index, [key for key, _ in batch], _by_view(features, views)

    waiting: deque[Future[Encoded]] = deque()
    pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for index, batch in read_batches(shards, max(1, num_rows // len(views))):
            waiting.append(pool.submit(work, index, batch))
            if len(waiting) >= max(BATCHES_AHEAD, 2 * num_threads):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)


@torch.inference_mode()
def encode_fitting(encode: Callable[[Tensor], Tensor], pixels: Tensor, fitting: Fitting) -> Tensor:
    """Pixels (rows, image_px, image_px, 3) uint8 to features (rows, num_regions, encoder_dim) float16, both on a CPU,
    in parts that fit into memory."""

    def work(parts: list[slice]) -> Tensor:
        found = [encode(pixels[part].to(fitting.device)).to(torch.float16).cpu() for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    return fitting.run(work, len(pixels))


def _by_view(features: Tensor, views: Sequence[str]) -> np.ndarray:
    """(batch × num_views, num_regions, encoder_dim) → (batch, num_views, num_regions, encoder_dim)."""
    return features.unflatten(0, (-1, len(views))).numpy()


def _encode_on_gpu(
    encoder: Encoder,
    shards: list[Path],
    batch_size: int | Literal["auto"],
    num_workers: int,
    dtype: torch.dtype,
    views: Sequence[str] = (PLAIN,),
) -> Generator[Encoded]:
    if not shards:
        return
    encode, device = _plain(encoder, dtype), next(encoder.parameters()).device
    fitting = Fitting(GPU_BATCH_SIZE if batch_size == "auto" else batch_size, device)
    if batch_size == "auto":
        # Before the first image, so that a resumed run settles on what the first one did, whatever its next shard.
        image_px = encoder.transform.image_px
        encode_fitting(encode, torch.zeros(fitting.num_images, image_px, image_px, 3, dtype=torch.uint8), fitting)
    loader = DataLoader(
        ShardImages(shards, encoder.transform, max(1, fitting.num_images // len(views)), views),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_identity,
        generator=torch.Generator(),  # else it draws from the global one
        worker_init_fn=_leave_signals_to_parent,
    )
    batches = iter(loader)
    while True:
        with monitoring.waiting():
            loaded = next(batches, None)
        if loaded is None:
            return
        index, keys, pixels = loaded
        yield index, keys, _by_view(encode_fitting(encode, pixels, fitting), views)


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


def _write(
    out: Path,
    shard: Path,
    batches: Iterable[Encoded],
    encoder: Encoder,
    views: Sequence[str],
    count: Callable[[int], None],
) -> None:
    about = count_images(shard), views, encoder.describe(), storage.digest_file(shard)
    with writing_features(out / f"{shard.stem}.h5", *about) as writer:
        for _, keys, features in batches:
            if (features.view(np.uint16) & INFINITE).max() == INFINITE:
                raise CapstanError(
                    f"{shard}: {encoder.name} gave features beyond float16; use features.precision: fp32"
                )
            writer.add(keys, features)
            count(len(keys))


def _is_done(path: Path, encoder: Encoder, shard: Path, views: Sequence[str]) -> bool:
    if not path.exists():
        return False
    try:
        found = open_features(path, verify=True)
        made_from = found.encoder, found.views, found.shard_digest
        return made_from == (encoder.describe(), list(views), storage.digest_file(shard))
    except CapstanError:
        storage.set_aside(path)
        return False
