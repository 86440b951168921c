"""Cached encoder features: one HDF5 file a shard, float16, uncompressed and contiguous so that a loader can map it.

They lie image by image, of each image view by view: a view of an image is one block of bytes, which a loader copies
whole; an image's views lie together, as they were made, so a file is written from its beginning to its end.

HDF5's own checksum needs chunks, which cannot be mapped; so the file carries a digest of all its bytes behind its end
(`storage.seal`), and one of its content as an attribute, by which later stages know it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from captioning.errors import CapstanError
from captioning.storage import atomic_write, check_seal, seal
from captioning.views import PLAIN

SCHEMA_VERSION = 2
"""2: views."""


class FeatureWriter:
    """A shard's file while it grows, batch by batch, so that its features never lie in memory together."""

    def __init__(self, file: h5py.File, num_images: int) -> None:
        self.file, self.num_images = file, num_images
        self.dataset: h5py.Dataset | None = None  # its shape comes with the first batch
        self.keys: list[str] = []
        self.digest = xxhash.xxh3_128()

    def add(self, keys: Sequence[str], features: np.ndarray) -> None:
        """The next images' keys and their (batch, num_views, num_regions, encoder_dim) float16."""
        assert features.dtype == np.float16 and features.ndim == 4 and len(keys) == len(features)
        if self.dataset is None:
            self.dataset = self.file.create_dataset("features", (self.num_images, *features.shape[1:]), np.float16)
        features = np.ascontiguousarray(features)
        self.dataset[len(self.keys) : len(self.keys) + len(keys)] = features
        self.digest.update(features.data)
        self.keys += keys

    def finish(self, views: Sequence[str], encoder: dict[str, Any], shard: str) -> None:
        assert self.dataset is not None and self.dataset.shape[:2] == (len(self.keys), len(views))
        self.file.create_dataset("keys", data=np.array(self.keys, dtype="S"))
        about = {
            "schema_version": SCHEMA_VERSION,
            "encoder": json.dumps(encoder, sort_keys=True),
            "shard_digest": shard,
            "views": json.dumps(list(views)),
        }
        self.digest.update(json.dumps([self.keys, about, self.dataset.shape]).encode())
        for name, value in {**about, "digest": self.digest.hexdigest()}.items():
            self.file.attrs[name] = value


@contextmanager
def writing_features(
    target: Path, num_images: int, views: Sequence[str], encoder: dict[str, Any], shard: str
) -> Iterator[FeatureWriter]:
    """Yields a writer to `add` batches to; the file appears at the end, whole or not at all.

    Args:
        num_images: of all batches together.
        encoder: `Encoder.describe()`.
        shard: digest of the shard that they are made from.
    """
    with atomic_write(target) as temporary:
        with h5py.File(temporary, "w") as file:
            writer = FeatureWriter(file, num_images)
            yield writer
            writer.finish(views, encoder, shard)
        seal(temporary)


def write_features(
    target: Path,
    keys: list[str],
    features: np.ndarray,
    encoder: dict[str, Any],
    shard: str,
    views: Sequence[str] = (PLAIN,),
) -> None:
    """Writes one shard's features at once. Arguments as above.

    Args:
        features: (num_images, num_views, num_regions, encoder_dim) float16; of one view, the second may be missing.
    """
    with writing_features(target, len(keys), views, encoder, shard) as writer:
        writer.add(keys, features[:, None] if features.ndim == 3 else features)


@dataclass(frozen=True)
class FeatureFile:
    """A shard's features, mapped: `features` is a read-only (num_images, num_views, num_regions, encoder_dim) float16
    memmap."""

    keys: list[str]
    features: np.ndarray
    views: list[str]
    encoder: dict[str, Any]
    shard_digest: str
    digest: str


def open_features(path: Path, verify: bool = False) -> FeatureFile:
    """Maps a feature file; pages are read when used and shared between processes.

    Args:
        verify: read everything and compare its digest (about 9 GB/s) before HDF5 sees it.

    Raises:
        CapstanError: not HDF5, another schema, or damaged bytes; names the file and what to do.
    """
    if verify:
        check_seal(path)
    try:
        with h5py.File(path, "r") as file:
            if file.attrs["schema_version"] != SCHEMA_VERSION:
                raise CapstanError(f"{path} has another schema; run `dvc repro` to make it again")
            dataset = file["features"]
            offset, shape, dtype = dataset.id.get_offset(), dataset.shape, dataset.dtype
            keys = [key.decode() for key in file["keys"][:]]
            views = [str(view) for view in json.loads(file.attrs["views"])]
            encoder, shard = json.loads(file.attrs["encoder"]), str(file.attrs["shard_digest"])
            digest = str(file.attrs["digest"])
        if dtype != np.float16 or len(shape) != 4 or shape[:2] != (len(keys), len(views)):
            raise CapstanError(
                f"{path} is damaged: {dtype} features of shape {shape} for {len(keys)} keys and {len(views)} views"
            )
        features = np.memmap(path, np.float16, "r", offset, shape) if shape[0] else np.empty(shape, np.float16)
    except (OSError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, CapstanError):
            raise
        raise CapstanError(f"{path} is damaged ({error}). Delete it and run `dvc repro` again.") from error
    return FeatureFile(keys, features, views, encoder, shard, digest)
