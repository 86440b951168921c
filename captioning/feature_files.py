"""Cached encoder features: one HDF5 file a shard, float16, uncompressed and contiguous so that a loader can map it.

HDF5's own checksum needs chunks, which cannot be mapped; so the file carries a digest of all its bytes behind its end
(`storage.seal`), and one of its content as an attribute, by which later stages know it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from captioning.errors import CapstanError
from captioning.storage import atomic_write, check_seal, seal

SCHEMA_VERSION = 1


def write_features(target: Path, keys: list[str], features: np.ndarray, encoder: dict[str, Any], shard: str) -> None:
    """Writes one shard's features, whole or not at all.

    Args:
        keys: the samples' keys, in the order of `features`.
        features: (num_images, num_regions, encoder_dim) float16.
        encoder: `Encoder.describe()`.
        shard: digest of the shard that they were made from.
    """
    with atomic_write(target) as temporary:
        _write(temporary, keys, features, encoder, shard)
        seal(temporary)


def _write(path: Path, keys: list[str], features: np.ndarray, encoder: dict[str, Any], shard: str) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=features)
        file.create_dataset("keys", data=np.array(keys, dtype="S"))
        file.attrs["schema_version"] = SCHEMA_VERSION
        file.attrs["encoder"] = text = json.dumps(encoder, sort_keys=True)
        file.attrs["shard_digest"] = shard
        file.attrs["digest"] = _digest(features, keys, text, shard)


def _digest(features: np.ndarray, keys: list[str], encoder: str, shard: str) -> str:
    digest = xxhash.xxh3_128(json.dumps([keys, encoder, shard, features.shape, features.dtype.str]).encode())
    digest.update(np.ascontiguousarray(features).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class FeatureFile:
    """A shard's features, mapped: `features` is a read-only (num_images, num_regions, encoder_dim) float16 memmap."""

    keys: list[str]
    features: np.ndarray
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
            encoder, shard = json.loads(file.attrs["encoder"]), str(file.attrs["shard_digest"])
            digest = str(file.attrs["digest"])
        if dtype != np.float16 or len(shape) != 3 or shape[0] != len(keys):
            raise CapstanError(f"{path} is damaged: {dtype} features of shape {shape} for {len(keys)} keys")
        features = np.memmap(path, np.float16, "r", offset, shape) if shape[0] else np.empty(shape, np.float16)
    except (OSError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, CapstanError):
            raise
        raise CapstanError(f"{path} is damaged ({error}). Delete it and run `dvc repro` again.") from error
    return FeatureFile(keys, features, encoder, shard, digest)
