"""Words and their ids. Built from the train split alone, so that no test word leaks into a model."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from captioning import storage
from captioning.errors import CapstanError

SCHEMA_VERSION = 1
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
# A word is letters and digits, joined by inner apostrophes, hyphens or dots: "man's", "t-shirt", "3.5".
_WORD = re.compile(r"\w+(?:['\-.]\w+)*")
_APOSTROPHES = str.maketrans({"\u2019": "'", "\u2018": "'", "`": "'", "\u2010": "-", "\u2011": "-"})


def clean_caption(text: str, lowercase: bool = True) -> str:
    """One line of words separated by single spaces; punctuation, control characters and emoji are dropped.

    Unicode is composed first (NFKC), so that full-width letters and ligatures become plain ones.
    """
    text = unicodedata.normalize("NFKC", text).translate(_APOSTROPHES).replace("_", " ")
    words = " ".join(_WORD.findall(text))
    return words.lower() if lowercase else words


class Vocabulary:
    """Maps words to ids and back. Ids 0 to 3 are `<pad>`, `<bos>`, `<eos>`, `<unk>`."""

    pad_id, bos_id, eos_id, unk_id = range(4)

    def __init__(self, words: list[str], max_length: int, lowercase: bool = True) -> None:
        """`words` starts with `SPECIAL`; `max_length` is the longest caption to train on, in words."""
        if tuple(words[: len(SPECIAL)]) != SPECIAL or len(set(words)) != len(words):
            raise CapstanError(f"a vocabulary starts with {' '.join(SPECIAL)} and holds each word once")
        self.words, self.max_length, self.lowercase = words, max_length, lowercase
        self._ids = {word: index for index, word in enumerate(words)}

    @classmethod
    def build(cls, captions: Iterable[str], min_frequency: int, max_length: int, lowercase: bool = True) -> Vocabulary:
        """Counts the words of cleaned captions; the most frequent get the lowest ids, ties in alphabetical order."""
        counts = Counter(word for caption in captions for word in caption.split())
        kept = sorted((word for word, count in counts.items() if count >= min_frequency), key=lambda w: (-counts[w], w))
        return cls([*SPECIAL, *kept], max_length, lowercase)

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self._ids

    def encode(self, caption: str) -> list[int]:
        """Ids of a caption's words, without bos and eos; an unknown word is `unk_id`."""
        return [self._ids.get(word, self.unk_id) for word in clean_caption(caption, self.lowercase).split()]

    def decode(self, token_ids: Iterable[int]) -> str:
        """The caption up to the first eos; pad, bos and unk leave no trace."""
        words = []
        for token_id in token_ids:
            if token_id == self.eos_id:
                break
            if token_id >= len(SPECIAL):
                words.append(self.words[token_id])
        return " ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """All there is, as JSON can write it."""
        shape = {"lowercase": self.lowercase, "max_length": self.max_length}
        return {"schema_version": SCHEMA_VERSION, **shape, "words": self.words}

    @classmethod
    def from_dict(cls, tree: Any, origin: Path) -> Vocabulary:
        """The reverse of `to_dict`.

        Raises:
            CapstanError: not a vocabulary, or of another schema; names `origin`.
        """
        if not isinstance(tree, dict) or tree.get("schema_version") != SCHEMA_VERSION:
            raise CapstanError(f"{origin} is not a vocabulary of schema {SCHEMA_VERSION}. Run `dvc repro prepare`.")
        return cls(tree["words"], tree["max_length"], tree["lowercase"])

    def save(self, path: Path) -> None:
        storage.write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Reads `vocabulary.json`. Raises CapstanError: the file is damaged or of another schema."""
        return cls.from_dict(storage.read_json(path), path)
