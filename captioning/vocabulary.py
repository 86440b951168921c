"""Tokens (words, or pieces of words) and their ids. Built from the train split alone, so that no test word leaks into
a model; `captioning.tokenization` does it."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from captioning import storage
from captioning.errors import CapstanError, unknown_name
from captioning.wordpiece import join_pieces, split_part, split_parts

SCHEMA_VERSION = 2
"""2: `tokenizer`."""
TOKENIZERS = ("words", "wordpiece")
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
# A word is letters and digits, joined by inner apostrophes, hyphens or dots: "man's", "t-shirt", "3.5".
_WORD = re.compile(r"\w+(?:['\-.]\w+)*")
_APOSTROPHES = str.maketrans({"\u2019": "'", "\u2018": "'", "`": "'", "\u2010": "-", "\u2011": "-"})


def clean_caption(text: str, lowercase: bool = True) -> str:
    """One line of words separated by single spaces; punctuation, control characters and emoji are dropped.

    Unicode is composed first (NFKC), so that full-width letters and ligatures become plain ones.
    """
    text = unicodedata.normalize("NFKC", text).translate(_APOSTROPHES).replace("_", " ")
    # Before words are found: the small letter of "İ" brings a combining dot, which is no part of a word.
    return " ".join(_WORD.findall(text.lower() if lowercase else text))


class Vocabulary:
    """Maps tokens to ids and back. Ids 0 to 3 are `<pad>`, `<bos>`, `<eos>`, `<unk>`."""

    pad_id, bos_id, eos_id, unk_id = range(4)

    def __init__(self, words: list[str], max_length: int, lowercase: bool = True, tokenizer: str = "words") -> None:
        """A vocabulary of known tokens.

        Args:
            words: the tokens, by id; they start with `SPECIAL`.
            max_length: the longest caption to train on, in tokens.
            tokenizer: `words` or `wordpiece`, see `captioning.wordpiece`.
        """
        if tuple(words[: len(SPECIAL)]) != SPECIAL or len(set(words)) != len(words):
            raise CapstanError(f"a vocabulary starts with {' '.join(SPECIAL)} and holds each word once")
        if tokenizer not in TOKENIZERS:
            raise unknown_name("tokenizer", tokenizer, TOKENIZERS)
        self.words, self.max_length, self.lowercase, self.tokenizer = words, max_length, lowercase, tokenizer
        self._ids = {word: index for index, word in enumerate(words)}
        self._spelled: dict[str, list[int]] = {}  # words that were met, for speed alone

    @classmethod
    def build(cls, captions: Iterable[str], min_frequency: int, max_length: int, lowercase: bool = True) -> Vocabulary:
        """Counts the words of cleaned captions; the most frequent get the lowest ids, ties in alphabetical order."""
        counts = Counter(word for caption in captions for word in caption.split())
        kept = sorted((word for word, count in counts.items() if count >= min_frequency), key=lambda w: (-counts[w], w))
        return cls([*SPECIAL, *kept], max_length, lowercase)

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        """Whether a word of a cleaned caption can be told apart: no part of it is unknown."""
        return self.unk_id not in self._spell(word)

    @property
    def unit(self) -> str:
        """What to call tokens: `words` or `pieces`."""
        return "words" if self.tokenizer == "words" else "pieces"

    def encode(self, caption: str) -> list[int]:
        """Ids of a caption's tokens, without bos and eos; what is unknown is `unk_id`."""
        words = clean_caption(caption, self.lowercase).split()
        return [token_id for word in words for token_id in self._spell(word)]

    def _spell(self, word: str) -> list[int]:
        if word not in self._spelled:
            self._spelled[word] = self._spell_anew(word)
        return self._spelled[word]

    def _spell_anew(self, word: str) -> list[int]:
        if self.tokenizer == "words":
            return [self._ids.get(word, self.unk_id)]
        parts = [split_part(part, self._ids) for part in split_parts(word)]
        return [i for pieces in parts for i in ([self._ids[p] for p in pieces] if pieces else [self.unk_id])]

    def join(self, token_ids: Sequence[int]) -> list[tuple[str, list[int]]]:
        """Whole words, special tokens among them, each with the positions of its tokens in `token_ids`."""
        tokens = [self.words[token_id] for token_id in token_ids]
        if self.tokenizer == "words":
            return [(token, [position]) for position, token in enumerate(tokens)]
        return join_pieces(tokens, apart=SPECIAL)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The caption up to the first eos, in whole words; pad, bos and unk leave no trace."""
        said = list(takewhile(lambda token_id: token_id != self.eos_id, token_ids))
        return " ".join(word for word, places in self.join(said) if said[places[0]] >= len(SPECIAL))

    def to_dict(self) -> dict[str, Any]:
        """All there is, as JSON can write it."""
        shape = {"tokenizer": self.tokenizer, "lowercase": self.lowercase, "max_length": self.max_length}
        return {"schema_version": SCHEMA_VERSION, **shape, "words": self.words}

    @classmethod
    def from_dict(cls, tree: Any, origin: Path) -> Vocabulary:
        """The reverse of `to_dict`.

        Raises:
            CapstanError: not a vocabulary, or of another schema; names `origin`.
        """
        if not isinstance(tree, dict) or tree.get("schema_version") != SCHEMA_VERSION:
            raise CapstanError(
                f"{origin} is not a vocabulary of schema {SCHEMA_VERSION}. Run `dvc repro` to remake it."
            )
        try:
            words, max_length = list(tree["words"]), int(tree["max_length"])
            return cls(words, max_length, bool(tree["lowercase"]), str(tree["tokenizer"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CapstanError(
                f"{origin} is not a whole vocabulary ({error}). Run `dvc repro` to remake it."
            ) from error

    def save(self, path: Path) -> None:
        storage.write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Reads `vocabulary.json`. Raises CapstanError: the file is damaged or of another schema."""
        return cls.from_dict(storage.read_json(path), path)
