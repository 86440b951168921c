"""Attention maps of generated captions: their file. (Their score: `captioning.reporting.attention_scores`.)

The file (`data/captions/<captioner>.attention.h5`) holds, for every image of the test split, one row of weights
over the encoder's grid for every generated word: the attention that the decoder used to predict that word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from captioning import storage
from captioning.errors import CapstanError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class AttentionMaps:
    """The maps of one captioner; row i of `image_ids` and `tokens` owns the weights `offsets[i]:offsets[i + 1]`."""

    grid: tuple[int, int]
    """(height, width) in cells; a row of weights is the grid row by row."""
    image_ids: list[str]
    tokens: list[list[str]]
    offsets: NDArray[np.int64]  # (num_images + 1,)
    weights: NDArray[np.float16]  # (num_words, height * width)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> NDArray[np.float16]:
        """The maps of image `index`: (num_tokens, height * width)."""
        return self.weights[self.offsets[index] : self.offsets[index + 1]]


def write_attention_maps(
    path: Path, grid: tuple[int, int], maps: Iterable[tuple[str, Sequence[str], NDArray[np.floating]]]
) -> None:
    """Writes the maps of one captioner, whole or not at all; the same maps give the same bytes.

    Args:
        grid: (height, width) of the encoder's grid in cells.
        maps: for each image its id, its words (with `<eos>` where the model ended), and their weights
            (num_words, height * width), non-negative, each row summing to 1.

    Raises:
        ValueError: weights of another shape or not finite, or a word that holds a space.
    """
    height, width = grid
    ids: list[str] = []
    lines: list[str] = []
    offsets = [0]
    rows = [np.zeros((0, height * width), np.float16)]
    for image_id, tokens, weights in maps:
        _check_map(image_id, tokens, weights, height * width)
        ids.append(image_id)
        lines.append(" ".join(tokens))
        offsets.append(offsets[-1] + len(tokens))
        rows.append(np.asarray(weights).astype(np.float16))
    with storage.atomic_write(path) as temporary:
        with h5py.File(temporary, "w") as file:
            text = h5py.string_dtype("utf-8")
            file.create_dataset("image_ids", data=np.array(ids, dtype=object), dtype=text)
            file.create_dataset("tokens", data=np.array(lines, dtype=object), dtype=text)
            file.create_dataset("offsets", data=np.array(offsets, np.int64))
            file.create_dataset("weights", data=np.concatenate(rows))
            file.attrs["grid_height"], file.attrs["grid_width"] = height, width
            file.attrs["schema_version"] = SCHEMA_VERSION
        storage.seal(temporary)


def load_attention_maps(path: Path) -> AttentionMaps:
    """Reads what `write_attention_maps` wrote, and verifies its digest first: HDF5 itself loads flipped bits silently,
    or loops for ever on them.

    Raises:
        CapstanError: the file is damaged or of another schema.
    """
    try:
        storage.check_seal(path)
        with h5py.File(path, "r") as file:
            version = int(file.attrs["schema_version"])
            grid = (int(file.attrs["grid_height"]), int(file.attrs["grid_width"]))
            ids, lines = ([str(s) for s in file[name].asstr()[:]] for name in ("image_ids", "tokens"))
            offsets, weights = file["offsets"][:], file["weights"][:]
    except Exception as error:  # h5py raises whatever a broken structure leads to
        raise CapstanError(f"{path} is damaged ({error}). {_mend(path)}") from error
    if version != SCHEMA_VERSION:
        raise CapstanError(f"{path} has schema version {version}, this code reads {SCHEMA_VERSION}. {_mend(path)}")
    tokens = [
        line.split(" ") if end > start else []
        for line, start, end in zip(lines, offsets[:-1], offsets[1:], strict=True)
    ]
    return AttentionMaps(grid, ids, tokens, offsets, weights)


def _mend(path: Path) -> str:
    captioner = path.name.removesuffix(".attention.h5")
    return f"Remake it with `dvc repro -f generate@{captioner}`, or fetch it with `dvc pull {path}`."


def _check_map(image_id: str, tokens: Sequence[str], weights: NDArray[np.floating], num_regions: int) -> None:
    expected = (len(tokens), num_regions)
    if np.shape(weights) != expected:
        raise ValueError(f"{image_id}: weights have the shape {np.shape(weights)}, {len(tokens)} words need {expected}")
    if not np.isfinite(weights).all():
        raise ValueError(f"{image_id}: weights are not finite")
    if any(" " in token or not token for token in tokens):
        raise ValueError(f"{image_id}: a token is empty or holds a space: {list(tokens)}")
