from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_decoder
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML
from tokenizers import Tokenizer, models, pre_tokenizers

from captioning import preparation, shards
from captioning.annotations import Annotation
from captioning.decoders import DecoderConfig, start_decoder
from captioning.errors import CapstanError
from captioning.params import parse_params
from captioning.storage import dump_json
from captioning.tokenization import BERT_SPECIAL, MAX_LINE, learn_pieces, read_pieces, start_vocabulary
from captioning.tokenizer_params import WordPieceTokenizer, WordsTokenizer
from captioning.vocabulary import SPECIAL, Vocabulary, clean_caption
from captioning.wordpiece import MAX_CHARACTERS
from stages.generate import _by_word

ROOT = Path(__file__).parents[1]
SYLLABLES = ["ka", "lo", "mi", "tu", "re", "sa", "no", "pi", "ve", "dü"]
MADE_UP = ["##x", "'", "-", "##s", "dog", "t", "shirt", *SPECIAL]


def made_up_captions(count: int = 300) -> list[str]:
    """Of many words that share their syllables, so that pairs of pieces tie."""
    draw = random.Random(0)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(400)]
    words += ["man's", "t-shirt", "3.5", "x" * (MAX_CHARACTERS + 5)]
    return [" ".join(draw.choices(words, k=7)) for _ in range(count)]


CAPTIONS = made_up_captions()


def learned(size: int = 200, captions: list[str] = CAPTIONS) -> Vocabulary:
    settings = WordPieceTokenizer(name="wordpiece", vocabulary_size=size, vocabulary_file=None)
    return start_vocabulary(captions, settings, max_length=9, lowercase=True)


LEARNED = learned()


def given_file(path: Path, pieces: list[str]) -> Path:
    path.write_text("".join(f"{piece}\n" for piece in [*BERT_SPECIAL, *pieces]))
    return path


def from_file(path: Path, captions: list[str], size: int = 100, lowercase: bool = True) -> Vocabulary:
    settings = WordPieceTokenizer(name="wordpiece", vocabulary_size=size, vocabulary_file=path)
    return start_vocabulary(captions, settings, max_length=9, lowercase=lowercase)


def bert(vocabulary: Vocabulary) -> Tokenizer:
    """Hugging Face's tokeniser over the same tokens."""
    ids = {word: index for index, word in enumerate(vocabulary.words)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="<unk>", max_input_chars_per_word=MAX_CHARACTERS))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


near = st.lists(st.sampled_from([*SYLLABLES, *"klmtrsx", " ", " ", "'", "-", ".", "ka-lo", "Ü", "x" * 99])).map("".join)


@given(near | st.text())
def test_captions_are_cut_as_hugging_face_cuts_them(text: str) -> None:
    assert LEARNED.encode(text) == bert(LEARNED).encode(clean_caption(text)).ids


@given(st.lists(st.sampled_from(CAPTIONS), min_size=1, max_size=3).map(" ".join) | near)
def test_known_captions_survive(text: str) -> None:
    token_ids = LEARNED.encode(text)
    whole = clean_caption(text)
    if LEARNED.unk_id not in token_ids:
        assert LEARNED.decode([*token_ids, LEARNED.eos_id, 5]) == whole
    assert [word for word in whole.split() if word not in LEARNED] == [
        word for word in whole.split() if LEARNED.unk_id in LEARNED.encode(word)
    ]


def test_apostrophes_hyphens_and_dots_come_back() -> None:
    assert LEARNED.decode(LEARNED.encode("Man's T-shirt 3.5")) == "man's t-shirt 3.5"
    assert LEARNED.encode("x" * (MAX_CHARACTERS + 5)) == [LEARNED.unk_id]


def test_all_words_are_made_of_learned_pieces() -> None:
    words = {word for caption in CAPTIONS for word in caption.split()}
    assert {word for word in words if word not in LEARNED} == {"x" * (MAX_CHARACTERS + 5)}
    assert len(LEARNED) <= 200 < len(words)
    assert any(len(piece.removeprefix("##")) > 2 for piece in LEARNED.words[4:])
    counts = Counter(token_id for caption in CAPTIONS for token_id in LEARNED.encode(caption))
    ranked = [counts[token_id] for token_id in range(4, len(LEARNED))]
    assert ranked == sorted(ranked, reverse=True) and ranked[-1] > 0


PRINT_VOCABULARY = """
import json, random, sys
from captioning.storage import dump_json
from captioning.tokenization import start_vocabulary
from captioning.tokenizer_params import WordPieceTokenizer
captions = json.load(sys.stdin)
random.Random(sys.argv[1]).shuffle(captions)
settings = WordPieceTokenizer(name="wordpiece", vocabulary_size=200, vocabulary_file=None)
sys.stdout.buffer.write(dump_json(start_vocabulary(captions, settings, 9, True).to_dict()))
"""


def test_the_same_captions_learn_the_same_pieces_in_any_process_and_order() -> None:
    draw = random.Random(0)
    captions = ["".join(draw.choices("abcdefghijklmnopqrst", k=5)) for _ in range(150)] * 3  # no pair wins clearly
    found = set()
    for seed in ("0", "1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": str(seed == "0").lower()}
        done = subprocess.run(
            [sys.executable, "-c", PRINT_VOCABULARY, seed],
            input=json.dumps(captions).encode(),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            check=True,
        )
        found.add(done.stdout)
    assert found == {dump_json(learned(200, captions).to_dict())}


def test_characters_that_do_not_fit_are_unknown_from_the_rarest() -> None:
    letters = [chr(0x4E00 + i) for i in range(300)]
    captions = [" ".join(letters[: 1 + i]) for i in range(300)]  # the first are the most frequent
    vocabulary = learned(100, captions)
    assert len(vocabulary) <= 100
    assert all(letter in vocabulary for letter in letters[:48]) and letters[60] not in vocabulary


def test_learning_survives_captions_with_little_in_them() -> None:
    assert learned(100, ["a"]).words == [*SPECIAL, "a"]
    assert learn_pieces(Counter(), 96) == []


def test_a_given_file_is_cut_to_its_most_frequent_pieces(tmp_path) -> None:
    pieces = ["[MASK]", "[unused1]", "cat", "dog", "do", "##g", "##s", "'", "s", "zebra"]
    path = given_file(tmp_path / "vocab.txt", pieces)
    captions = ["dog dogs dog's", "dog cat", "dog zebu"]
    vocabulary = from_file(path, captions)
    assert vocabulary.words == [*SPECIAL, "dog", "##s", "'", "cat", "s"]  # what never occurs is left out
    assert vocabulary.encode("Dogs dog's zebu") == [4, 5, 4, 6, 8, vocabulary.unk_id]
    many = [f"w{i:03d}" for i in range(200)]
    often = [" ".join(many[: i + 1]) for i in range(200)]
    cut = from_file(given_file(tmp_path / "many.txt", many[::-1]), often)
    assert cut.words == [*SPECIAL, *many[:96]]


def test_line_ends_and_a_byte_order_mark_are_no_part_of_pieces(tmp_path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*BERT_SPECIAL, "dog", "\u2028", "狗"]).encode())
    assert read_pieces(path) == [*BERT_SPECIAL, "dog", "\u2028", "狗"]


SPECIAL_LINES = "".join(f"{name}\n" for name in BERT_SPECIAL).encode()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "is missing. Give the path"),
        (b"", "is empty"),
        (b"dog\ncat\n", "lacks [PAD], [UNK], [CLS], [SEP]"),
        (SPECIAL_LINES.replace(b"[UNK]\n", b""), "lacks [UNK]. Expected"),
        (SPECIAL_LINES + b"dog\ncat\ndog\n", "line 7: 'dog' stands on line 5, too"),
        (SPECIAL_LINES + b"\ndog\n", "line 5 is empty"),
        (SPECIAL_LINES + b"a" * (MAX_LINE + 1) + b"\n", "line 5 is longer than"),
        (b"x" * 5_000_000, "line 1 is longer than"),
        (SPECIAL_LINES + b"d\xf6g\n", "line 5 is not UTF-8"),
        (b"\x00\xff\xfe" * 9, "line 1 is not UTF-8"),
    ],
)
def test_a_hostile_file_is_refused_with_what_to_do(tmp_path, content, fault) -> None:
    path = tmp_path / "vocab.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CapstanError) as caught:
        read_pieces(path)
    assert str(path) in str(caught.value) and fault in str(caught.value)
    assert "prepare.tokenizer.vocabulary_file" in str(caught.value) and "null" in str(caught.value)


def test_a_line_of_the_longest_length_is_read(tmp_path) -> None:
    path = given_file(tmp_path / "vocab.txt", ["a" * MAX_LINE, "b"])
    assert read_pieces(path)[-2:] == ["a" * MAX_LINE, "b"]
    with pytest.raises(CapstanError, match="is missing"):
        read_pieces(tmp_path)  # a folder


def test_a_file_without_the_captions_pieces_is_refused(tmp_path) -> None:
    with pytest.raises(CapstanError, match="none of the pieces .* occurs in the train captions"):
        from_file(given_file(tmp_path / "vocab.txt", ["Dog", "Katze"]), ["dog"])
    assert len(from_file(tmp_path / "vocab.txt", ["Dog"], lowercase=False)) == 5


def test_words_are_joined_with_their_tokens_places() -> None:
    vocabulary = Vocabulary([*SPECIAL, "dog", "##s", "t", "-", "shirt", "'"], 5, tokenizer="wordpiece")
    ids = {word: index for index, word in enumerate(vocabulary.words)}
    tokens = ["##s", "dog", "##s", "t", "-", "shirt", "dog", "<unk>", "##s", "'", "<eos>", "-", "dog"]
    joined = vocabulary.join([ids[token] for token in tokens])
    assert joined == [
        *[("s", [0]), ("dogs", [1, 2]), ("t-shirt", [3, 4, 5]), ("dog", [6]), ("<unk>", [7]), ("s'", [8, 9])],
        *[("<eos>", [10]), ("-dog", [11, 12])],
    ]
    assert vocabulary.decode([ids[token] for token in tokens]) == "s dogs t-shirt dog s'"


@given(st.lists(st.integers(0, len(MADE_UP) - 1)))
def test_whatever_a_model_says_can_be_read(token_ids: list[int]) -> None:
    words = [*SPECIAL, *(piece for piece in MADE_UP if piece not in SPECIAL)]
    vocabulary = Vocabulary(words, 5, tokenizer="wordpiece")
    joined = vocabulary.join(token_ids)
    assert [place for _, places in joined for place in places] == list(range(len(token_ids)))
    assert all(word and " " not in word for word, _ in joined)
    assert all(len(places) == 1 for word, places in joined if word in SPECIAL)
    assert "##" not in vocabulary.decode(token_ids)


def test_maps_of_a_words_pieces_are_averaged() -> None:
    weights = np.array([[1, 0], [0.5, 0.5], [0, 1], [0.25, 0.75]], np.float16)
    words, maps = _by_word([("dogs", [0, 1, 2]), ("<eos>", [3])], weights)
    assert words == ["dogs", "<eos>"] and maps.dtype == np.float16
    assert maps.tolist() == [[0.5, 0.5], [0.25, 0.75]]
    same = np.random.default_rng(0).dirichlet(np.ones(49), 12).astype(np.float16)
    assert _by_word([(str(i), [i]) for i in range(12)], same)[1].tobytes() == same.tobytes()
    assert _by_word([], same[:0])[1].shape == (0, 49)


def test_a_saved_vocabulary_needs_nothing_else(tmp_path) -> None:
    LEARNED.save(tmp_path / "vocabulary.json")
    again = Vocabulary.load(tmp_path / "vocabulary.json")
    assert (again.to_dict(), again.unit) == (LEARNED.to_dict(), "pieces")
    assert [again.encode(caption) for caption in CAPTIONS] == [LEARNED.encode(caption) for caption in CAPTIONS]


@pytest.mark.parametrize(
    ("key", "value"), [("tokenizer", "bpe"), ("tokenizer", None), ("words", None), ("max_length", "x"), ("words", [])]
)
def test_what_is_no_whole_vocabulary_is_refused(key, value) -> None:
    with pytest.raises(CapstanError, match="v.json is not a whole vocabulary .* Run `dvc repro`"):
        Vocabulary.from_dict(LEARNED.to_dict() | {key: value}, Path("v.json"))
    with pytest.raises(CapstanError, match="not a vocabulary of schema 2"):
        Vocabulary.from_dict(LEARNED.to_dict() | {"schema_version": 1}, Path("v.json"))


def test_search_over_pieces_gives_whole_words() -> None:
    from captioning.beam_search import beam_search

    decoder = small_decoder("transformer", vocabulary_size=len(LEARNED))
    found = beam_search(decoder, torch.randn(3, 4, 6, dtype=torch.float64), 2, 8, no_repeat_trigram=True)
    for hypothesis in found:
        assert LEARNED.decode(hypothesis.token_ids).replace("##", "") == LEARNED.decode(hypothesis.token_ids)
        words, maps = _by_word(LEARNED.join(hypothesis.token_ids), hypothesis.attention_weights.numpy())
        assert len(words) == len(maps) <= len(hypothesis.token_ids)


# Params


def params_with(tokenizer: dict[str, Any], **lstm: Any) -> Any:
    tree = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    tree["prepare"]["tokenizer"] = tokenizer
    tree["decoder_settings"]["lstm"] |= lstm
    return parse_params(tree)


PIECES = {"name": "wordpiece", "vocabulary_size": 1000, "vocabulary_file": None}


def test_tokenizers_by_name() -> None:
    assert params_with(PIECES).prepare.tokenizer == WordPieceTokenizer(**PIECES)
    assert params_with(PIECES | {"vocabulary_file": "a/vocab.txt"}).prepare.tokenizer.vocabulary_file == Path(
        "a/vocab.txt"
    )
    words = {"name": "words", "min_frequency": 3}
    assert params_with(words).prepare.tokenizer == WordsTokenizer(**words)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"name": "wordpeice"}, "unknown tokenizer name 'wordpeice'. Did you mean 'wordpiece'?"),
        ({}, "prepare.tokenizer.name: missing"),
        (PIECES | {"min_frequency": 2}, "prepare.tokenizer.min_frequency: unknown key (of words only)"),
        (PIECES | {"vocabulary_size": 9}, "prepare.tokenizer.vocabulary_size: Input should be greater than or equal"),
        ({"name": "wordpiece", "vocabulary_size": 500}, "prepare.tokenizer.vocabulary_file: missing"),
        ({"name": "words", "min_frequency": 0}, "prepare.tokenizer.min_frequency"),
    ],
)
def test_wrong_settings_are_named(tokenizer, message) -> None:
    with pytest.raises(CapstanError) as caught:
        params_with(tokenizer)
    assert message in str(caught.value)


def test_word_vectors_for_pieces_are_refused_before_anything_is_read() -> None:
    with pytest.raises(CapstanError, match="decoder_settings.lstm.embeddings: vectors of words do not fit .*wordpiece"):
        params_with(PIECES, embeddings="glove_6B_50d", embedding_dim=50)
    params_with({"name": "words", "min_frequency": 1}, embeddings="glove_6B_50d", embedding_dim=50)
    sizes = {"encoder_dim": 4, "hidden_dim": 6, "embedding_dim": 50, "dropout": 0.0}
    config = DecoderConfig(type="gru", vocabulary_size=len(LEARNED), embeddings="glove_6B_50d", **sizes)
    with pytest.raises(CapstanError, match="vectors of words, and the vocabulary holds pieces"):
        start_decoder(config, LEARNED)


# The prepare stage


def row(number: int, split: str, captions: list[str]) -> shards.LedgerRow:
    place = ("00000", f"{number:08d}", 40, 30, "d")
    return shards.LedgerRow(f"s/{number}", "s", split, "file:///x", shards.SUCCESS, "", *place, captions, "[]")


def test_the_first_sentences_of_a_caption_are_kept(tmp_path) -> None:
    captions = ["A 3.5 m pole. It is red.", "Dr. Li runs", "!!! A dog. No."]
    rows = [row(i, split, captions) for i, split in enumerate(("train", "val", "test"))]
    shards.write_ledger(tmp_path / "ledger.parquet", rows, {shards.TARS: "{}"})
    first = preparation.read_ledger(tmp_path / "ledger.parquet", True, max_sentences=1)
    assert [a.captions for a in first] == [["a 3.5 m pole", "dr li runs", "a dog"]] * 3
    whole = preparation.read_ledger(tmp_path / "ledger.parquet", True, max_sentences=None)
    assert whole[0].captions == ["a 3.5 m pole it is red", "dr li runs", "a dog no"]


def annotations() -> list[Annotation]:
    groups = [("train", CAPTIONS[:200]), ("val", CAPTIONS[200:250]), ("test", ["kalo q tu", "re"])]
    return [
        Annotation(image_id=f"s/{split}{i}", source="s", split=split, shard="0", key=str(i), captions=[caption])
        for split, captions in groups
        for i, caption in enumerate(captions)
    ]


def test_lengths_are_counted_in_tokens_and_the_unknown_in_words() -> None:
    train = [a for a in annotations() if a.split == "train"]
    settings = WordPieceTokenizer(**PIECES | {"vocabulary_size": 120})
    vocabulary = preparation.build_vocabulary(train, settings, 100, True)
    lengths = [len(vocabulary.encode(a.captions[0])) for a in train]
    assert vocabulary.max_length == max(lengths) > 7
    found = preparation.statistics(annotations(), vocabulary)
    assert found["train"]["max_length"] == 7 and found["train"]["too_long_rate"] == 0
    assert found["train"]["mean_tokens"] == pytest.approx(np.mean(lengths), abs=1e-3)
    assert found["test"]["unknown_rate"] == 0.25  # q of four words
    half = preparation.build_vocabulary(train, settings, 50, True)
    assert preparation.statistics(annotations(), half)["train"]["too_long_rate"] == pytest.approx(
        np.mean(np.array(lengths) > half.max_length), abs=1e-6
    )


def test_words_are_as_before() -> None:
    train = [a for a in annotations() if a.split == "train"]
    vocabulary = preparation.build_vocabulary(train, WordsTokenizer(name="words", min_frequency=5), 100, True)
    assert vocabulary.words == Vocabulary.build(CAPTIONS[:200], 5, 7).words and vocabulary.max_length == 7
    found = preparation.statistics(annotations(), vocabulary)["train"]
    assert found["mean_tokens"] == found["mean_length"] == 7
