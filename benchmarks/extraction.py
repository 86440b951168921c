"""P3 and P4: what feature extraction adds to the bare network, and what cached features save: O(10 min).

python -m benchmarks.extraction
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from benchmarks.measure import Row, in_turn, ratio, show
from benchmarks.workload import NUM_REGIONS, VOCABULARY_SIZE, synthetic_batch
from captioning import paths
from captioning.datasets import Batch, FeatureStore
from captioning.decoders import Decoder, DecoderConfig, build_decoder
from captioning.encoders import IMAGENET, Encoder, build_encoder, fuse_encoder
from captioning.extraction import CPU_BATCH_SIZE, decode, extract_features, read_batches
from captioning.feature_files import write_features
from captioning.images import MAX_PIXELS, normalise_image
from captioning.precision import DTYPES, autocast, can_fuse, keep_memory
from captioning.shards import ShardWriter

NUM_SHARDS, NUM_IMAGES, NUM_COPIES = 3, 6000, 5
"""P3 extracts as many images as Flickr8k trains with, for loading and the last file's way to the disk count once. A
fifth of them are different."""
NUM_IMAGES_LARGE = NUM_IMAGES // NUM_COPIES
"""For a network that is six times as slow."""
NUM_BARE, NUM_EAGER = 384, 192  # the bare network needs fewer, as it has no beginning and no end
IMAGES, CAPTIONS = 16, 5  # of a training step
EXTRACTION, BARE, BARE_BY_CORE = "extraction", "bare network", "bare network, a batch on each core"
EAGER, DECODING = "bare network, eager", "decoding alone, one core"


def photographs(num: int, width: int, height: int) -> Iterator[Image.Image]:
    """Parts of scikit-learn's two photographs, so that JPEGs are as hard to decode as real ones (0.4 bytes a pixel)."""
    draw = np.random.default_rng(0)
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for _ in range(num):
        photo = photos[int(draw.integers(len(photos)))]
        scale = draw.uniform(1.2, photo.height / height)
        part = np.array([width, height]) * scale
        left, top = draw.uniform((0, 0), np.array(photo.size) - part)
        yield photo.resize((width, height), Image.Resampling.LANCZOS, (left, top, left + part[0], top + part[1]))


def write_shards(folder: Path, num_images: int, width: int = 341, height: int = 256) -> list[Path]:
    """`NUM_SHARDS` shards as `download` writes them."""
    images = photographs(num_images, width, height)
    shards = [folder / f"{number:05d}.tar" for number in range(NUM_SHARDS)]
    for shard in shards:
        with ShardWriter(shard) as writer:
            for i, image in enumerate(islice(images, num_images // NUM_SHARDS)):
                buffer = io.BytesIO()
                image.save(buffer, "BMP")
                writer.add(f"{i:08d}", normalise_image(buffer.getvalue(), 256, 95, MAX_PIXELS).jpeg, {})
    return shards


def copy_shards(shards: list[Path], num_copies: int) -> list[Path]:
    """The shards, and copies of them under other names, `num_copies` of each in all."""
    found = list(shards)
    for number in range(len(shards), len(shards) * num_copies):
        found.append(shards[0].with_name(f"{number:05d}.tar"))
        shutil.copyfile(shards[number % len(shards)], found[-1])
    return found


@contextmanager
def project_folder() -> Iterator[Path]:
    """On the project's disk, below `.work`: what a killed benchmark leaves there is ignored by git."""
    paths.work_root().mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=paths.work_root()) as folder:
        yield Path(folder)


class Extraction:
    """Extraction with one encoder in one number format, and the network alone; each says how many images it takes."""

    def __init__(self, encoder: Encoder, shards: list[Path], num_images: int, out: Path, precision: str) -> None:
        self.encoder, self.shards, self.num_images, self.out = encoder, shards, num_images, out
        self.precision = precision
        self.dtype = DTYPES[precision]
        batches = islice(read_batches(shards, CPU_BATCH_SIZE), 12)
        self.pixels = [decode(batch, encoder.transform) for _, batch in batches]
        self.fused = fuse_encoder(encoder, CPU_BATCH_SIZE, self.dtype)

    def works(self) -> dict[str, tuple[Callable[[], object], int]]:
        return {
            f"{self.precision}: {EXTRACTION}": (self.extract, self.num_images),
            f"{self.precision}: {BARE}": (self.bare, NUM_BARE),
            f"{self.precision}: {BARE_BY_CORE}": (self.bare_by_core, NUM_BARE),
            f"{self.precision}: {EAGER}": (self.eager, NUM_EAGER),
        }

    def extract(self) -> None:
        with redirect_stdout(io.StringIO()):
            extract_features(self.encoder, self.shards, self.out, 32, 1, self.precision)

    def bare(self) -> None:
        """The same network, all threads on one batch, as one would call it."""
        for i in range(NUM_BARE // CPU_BATCH_SIZE):
            self._encode(i)

    def bare_by_core(self) -> None:
        """The same network, a batch on each core: the most that the machine can do."""
        num_threads = torch.get_num_threads()
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(self._encode, range(NUM_BARE // CPU_BATCH_SIZE)))
        torch.set_num_threads(num_threads)

    def eager(self) -> None:
        """The network as its package builds it, in channels_last, batches of 32."""
        batches = [torch.cat(self.pixels[i : i + 4]) for i in range(0, len(self.pixels), 4)]
        for i in range(NUM_EAGER // 32):
            with torch.inference_mode(), autocast(torch.device("cpu"), self.dtype):
                self.encoder(batches[i % len(batches)])

    def _encode(self, number: int) -> None:
        with torch.inference_mode():
            self.fused(self.pixels[number % len(self.pixels)])

    @torch.inference_mode()
    def differences(self) -> dict[str, float]:
        """From the package's network in float32: the greatest of any feature, and the norm's share."""
        expected = torch.cat([self.encoder(pixels) for pixels in self.pixels[:4]])
        apart = torch.cat([self.fused(pixels) for pixels in self.pixels[:4]]).float() - expected
        return {
            f"{self.precision}: greatest difference from eager fp32": float(apart.abs().max()),
            f"{self.precision}: relative difference from eager fp32": float(apart.norm() / expected.norm()),
        }

    def ratios(self, rates: dict[str, float]) -> dict[str, float]:
        found = {name: rates[f"{self.precision}: {name}"] for name in (EXTRACTION, BARE, BARE_BY_CORE, EAGER)}
        core_s = torch.get_num_threads() / found[BARE_BY_CORE]  # of one core, for an image
        return {
            f"{self.precision}: extraction / bare network": found[EXTRACTION] / found[BARE],
            f"{self.precision}: extraction / network and decoding alone": found[EXTRACTION]
            * (core_s + 1 / rates[DECODING])
            / torch.get_num_threads(),
            f"{self.precision}: extraction / eager network": found[EXTRACTION] / found[EAGER],
        }


def measure_extraction() -> Row:
    """P3: extraction beside the bare network on pixels in memory, the default encoder's."""
    return _beside_bare("efficientnet_lite0", "package", NUM_IMAGES)


def measure_large_extraction() -> Row:
    """The same for an encoder of the field's usual size; its weights are random, which changes no time."""
    return _beside_bare("resnet50", "random", NUM_IMAGES_LARGE)


def _beside_bare(name: str, weights: str, num_images: int) -> Row:
    assert can_fuse() and not torch.cuda.is_available(), "written for a CPU with oneDNN"
    keep_memory()
    encoder = build_encoder(name, weights)
    with project_folder() as folder:
        shards = copy_shards(write_shards(folder, num_images // NUM_COPIES), NUM_COPIES)
        runs = [Extraction(encoder, shards, num_images, folder, precision) for precision in ("fp32", "bf16")]
        works: dict[str, tuple[Callable[[], object], int]] = {DECODING: (lambda: _decode(shards, encoder), num_images)}
        for run in runs:
            works |= run.works()
        times = in_turn({name: work for name, (work, _) in works.items()}, repeats=3)
    rates = {name: images / times[name]["median_s"] for name, (_, images) in works.items()}
    ratios: dict[str, float] = {}
    check = {f"{name}, images/s": rate for name, rate in rates.items()}
    for run in runs:
        ratios |= run.ratios(rates)
        check |= run.differences()
    work = f"P3 {encoder.name}, {num_images} JPEGs of 341×256 to HDF5"
    return {"work": work, "times": times, "ratios": ratios, "check": check}


def _decode(shards: list[Path], encoder: Encoder) -> None:
    for _, batch in read_batches(shards, CPU_BATCH_SIZE):
        decode(batch, encoder.transform)


class Steps:
    """A training step on cached features, and the same step with its images encoded first."""

    def __init__(self, folder: Path, encode: Callable[[Tensor], Tensor], encoder_dim: int, jpegs: list[Any]) -> None:
        self.encode, self.jpegs, self.batch = encode, jpegs, synthetic_batch(IMAGES)
        torch.manual_seed(0)
        self.decoder: Decoder = build_decoder(
            DecoderConfig(
                type="lstm",
                attention="bahdanau",
                context_gate=True,
                vocabulary_size=VOCABULARY_SIZE,
                encoder_dim=encoder_dim,
                embedding_dim=512,
                hidden_dim=512,
                attention_dim=512,
                region_dim=512,
                dropout=0.0,
            )
        )
        values = np.random.default_rng(0).normal(size=(IMAGES, NUM_REGIONS, encoder_dim)).clip(0).astype(np.float16)
        folder.mkdir()
        keys = [str(i) for i in range(IMAGES)]
        write_features(folder / "0.h5", keys, values, {}, "")
        self.store = FeatureStore(folder, [SimpleNamespace(image_id=key, shard="0", key=key) for key in keys])

    def cached(self) -> None:
        self._step(self.store.gather(range(IMAGES)))

    def live(self, times: int) -> None:
        """Decodes and encodes each image `times` times, in batches of `IMAGES`, before the step."""
        for _ in range(times):
            with torch.inference_mode():
                features = self.encode(decode(self.jpegs, IMAGENET))
        self._step(features.clone())  # outside of inference mode, as backward wants it

    def _step(self, features: Tensor) -> None:
        self.decoder.zero_grad()
        batch = Batch(**{**vars(self.batch), "features": features.float()})
        nn.functional.cross_entropy(self.decoder(batch), batch.packed_targets).backward()


def resnet101() -> tuple[Encoder, int]:
    """The tutorials' encoder, as they run it: torchvision's network, eager, float32; here in channels_last."""
    from torchvision.models import resnet101 as build

    backbone = nn.Sequential(*list(build().eval().children())[:-2])
    return Encoder("resnet101", backbone, IMAGENET, 2048, "random"), 2048


def measure_cached_epoch() -> Row:
    """P4: a training step from the cache beside the same with JPEGs decoded and encoded; an epoch is many of them.

    The tutorials' data sets hold pairs of image and caption, so each image is encoded once a caption. An encoding once
    an image of a batch is what this project's batches would allow.
    """
    keep_memory()
    lite = build_encoder("efficientnet_lite0", "package")
    encoders: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
        lite.name: (fuse_encoder(lite, IMAGES, torch.float32), lite.encoder_dim),
        "resnet101": resnet101(),
    }
    works: dict[str, Callable[[], object]] = {}
    with project_folder() as folder:
        _, jpegs = next(read_batches(write_shards(folder, NUM_SHARDS * IMAGES), IMAGES))
        for name, (encode, encoder_dim) in encoders.items():
            steps = Steps(folder / name, encode, encoder_dim, jpegs)
            works[f"{name}: cached"] = steps.cached
            works[f"{name}: live, once an image"] = partial(steps.live, 1)
            works[f"{name}: live, once a caption"] = partial(steps.live, CAPTIONS)
        times = in_turn(works, repeats=3)
    ratios = {
        f"{name}, once {how}: live / cached": ratio(times, f"{name}: live, once {how}", f"{name}: cached")
        for name in encoders
        for how in ("an image", "a caption")
    }
    about = {"the goal's ratio": "resnet101, once a caption", "cores": os.cpu_count()}
    work = f"P4 a training step of {IMAGES} × {CAPTIONS} captions, LSTM + Bahdanau, fp32, images of 224×224"
    return {"work": work, "times": times, "ratios": ratios, "check": about}


if __name__ == "__main__":
    started = time.perf_counter()
    show(measure_extraction())
    show(measure_large_extraction())
    show(measure_cached_epoch())
    print(f"{time.perf_counter() - started:.0f} s")
