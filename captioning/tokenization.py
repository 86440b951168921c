"""Vocabularies from the train captions: counted words, learned pieces, or the pieces of a given file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from captioning.errors import CapstanError
from captioning.heuristics import resolve_min_frequency
from captioning.tokenizer_params import TokenizerSettings, WordsTokenizer
from captioning.vocabulary import SPECIAL, Vocabulary
from captioning.wordpiece import CONTINUES, MAX_CHARACTERS, split_part, split_parts

MAX_LINE = 1000
"""Bytes; a longer line is no piece."""
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_KEY = "prepare.tokenizer.vocabulary_file"


def start_vocabulary(
    captions: Sequence[str], settings: TokenizerSettings, max_length: int, lowercase: bool
) -> Vocabulary:
    """The vocabulary of cleaned captions: the same captions give the same one, whatever their order.

    Raises:
        CapstanError: the given file cannot be read, is no vocab.txt, or has none of the captions' pieces.
    """
    if isinstance(settings, WordsTokenizer):
        threshold = resolve_min_frequency(settings.min_frequency, len(captions))
        if threshold != settings.min_frequency:
            print(f"min_frequency {threshold} (auto: {len(captions)} captions in train)")
        return Vocabulary.build(captions, threshold, max_length, lowercase)
    parts = Counter(part for caption in captions for word in caption.split() for part in split_parts(word))
    num_pieces = settings.vocabulary_size - len(SPECIAL)
    given = settings.vocabulary_file
    candidates = learn_pieces(parts, num_pieces) if given is None else read_pieces(given)
    pieces = most_frequent(set(candidates), parts, num_pieces)
    if not pieces:
        raise CapstanError(
            f"{_KEY}: none of the pieces of {given} occurs in the train captions. Is it of another "
            "language, or of capital letters alone where prepare.lowercase is true?"
        )
    return Vocabulary([*SPECIAL, *pieces], max_length, lowercase, "wordpiece")


def check_files(settings: TokenizerSettings) -> list[Path]:
    """The files that a vocabulary will be made of, beside captions. Raises CapstanError: see `read_pieces`."""
    if isinstance(settings, WordsTokenizer) or settings.vocabulary_file is None:
        return []
    read_pieces(settings.vocabulary_file)
    return [settings.vocabulary_file]


def most_frequent(candidates: set[str], parts: Counter[str], num_pieces: int) -> list[str]:
    """The candidates that the parts are most often cut into, ties in alphabetical order; none that is never used:
    it would never be trained."""
    counts: Counter[str] = Counter()
    for part, count in parts.items():
        for piece in split_part(part, candidates) or ():
            counts[piece] += count
    return sorted(counts, key=lambda piece: (-counts[piece], piece))[:num_pieces]


def learn_pieces(parts: Counter[str], num_pieces: int) -> list[str]:
    """Pieces by Hugging Face's trainer: from characters up, the most frequent pair of pieces becomes a new one.

    Of characters, the most frequent that fit are kept (each takes a piece at a word's start and one within); words
    with another one are unknown.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    parts = Counter({part: count for part, count in parts.items() if len(part) <= MAX_CHARACTERS})
    letters = _most_frequent_characters(parts, num_pieces // 2)
    usable = {part: count for part, count in sorted(parts.items()) if letters.issuperset(part)}
    # The trainer numbers "##" characters in the order of a hash table of random seed, and breaks ties between pairs
    # by these numbers: two runs would learn other pieces. As special tokens they have numbers beforehand.
    alphabet = [*sorted(letters), *(CONTINUES + letter for letter in sorted(letters))]
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=num_pieces, min_frequency=2, show_progress=False, special_tokens=alphabet
    )
    tokenizer.train_from_iterator(_repeat(usable), trainer)
    return sorted(tokenizer.get_vocab())


def _most_frequent_characters(parts: Counter[str], limit: int) -> set[str]:
    counts: Counter[str] = Counter()
    for part, count in parts.items():
        for letter in part:
            counts[letter] += count
    return set(sorted(counts, key=lambda letter: (-counts[letter], letter))[:limit])


def _repeat(parts: dict[str, int], at_once: int = 1000) -> Iterator[str]:
    """Each part as often as it was counted, in texts of at most `at_once` words."""
    for part, count in parts.items():
        for done in range(0, count, at_once):
            yield " ".join([part] * min(at_once, count - done))


def read_pieces(path: Path) -> list[str]:
    """A file in the format of BERT's vocab.txt: a piece on each line, among them `[PAD] [UNK] [CLS] [SEP]`.

    Raises:
        CapstanError: no such file, or of another format; names the line.
    """
    if not path.is_file():
        raise CapstanError(f"{_KEY}: {path} is missing. Give the path of a BERT vocab.txt, or null to learn pieces.")
    places: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            for number, piece in enumerate(_lines(file, path), 1):
                if piece in places:
                    raise _refused(path, f"line {number}: {piece!r} stands on line {places[piece]}, too; delete one")
                places[piece] = number
    except OSError as error:
        raise CapstanError(f"{_KEY}: {path} cannot be read: {error.strerror}") from error
    missing = [name for name in BERT_SPECIAL if name not in places]
    if missing:
        raise _refused(path, f"lacks {', '.join(missing)}" if places else "is empty")
    return list(places)


def _lines(file: BinaryIO, path: Path) -> Iterable[str]:
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 2), b""), 1):
        content = line.removesuffix(b"\n").removesuffix(b"\r")
        if len(content) > MAX_LINE:
            raise _refused(path, f"line {number} is longer than {MAX_LINE} bytes")
        try:
            piece = content.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _refused(path, f"line {number} is not UTF-8 ({error.reason})") from error
        if not piece:
            raise _refused(path, f"line {number} is empty")
        yield piece


def _refused(path: Path, fault: str) -> CapstanError:
    return CapstanError(
        f"{_KEY}: {path}: {fault}. Expected BERT's vocab.txt: one piece a line, each once, in UTF-8, with "
        f"{' '.join(BERT_SPECIAL)}. Download it again, or set it to null to learn pieces from the captions."
    )
