"""WordPiece: words into pieces, as BERT does it, and pieces into words again.

Longest piece first, from the left; a piece that goes on with a word begins with `##`. Apostrophes, hyphens and dots
within a word are tokens of their own, as in BERT: `man's` is `man ' s`, and becomes one word again in `join_pieces`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence

CONTINUES = "##"
MAX_CHARACTERS = 100
"""Of a word: a longer one is unknown, as in Hugging Face's tokenizers."""
_JOINERS = ("'", "-", ".")  # all that cleaned captions hold beside letters and digits
_PARTS = re.compile(r"['\-.]|[^'\-.]+")


def split_parts(word: str) -> list[str]:
    """`t-shirt` → `t`, `-`, `shirt`: what is cut into pieces by itself."""
    return _PARTS.findall(word)


def split_part(part: str, known: Container[str]) -> list[str] | None:
    """The pieces of one part, or None where it cannot be made of known ones."""
    if len(part) > MAX_CHARACTERS:
        return None
    pieces, start = [], 0
    while start < len(part):
        prefix = CONTINUES if start else ""
        ends = range(len(part), start, -1)
        end = next((end for end in ends if prefix + part[start:end] in known), None)
        if end is None:
            return None
        pieces.append(prefix + part[start:end])
        start = end
    return pieces


def join_pieces(tokens: Sequence[str], apart: Iterable[str]) -> list[tuple[str, list[int]]]:
    """Whole words, each with the positions of its tokens; tokens of `apart` stay by themselves.

    What a model made up is joined as well as it goes: `##s` after nothing is the word `s`.
    """
    bounds = set(apart)
    words: list[tuple[str, list[int]]] = []
    goes_on = False  # after a joiner
    for position, token in enumerate(tokens):
        joins = goes_on or token.startswith(CONTINUES) or token in _JOINERS
        if words and joins and token not in bounds and tokens[position - 1] not in bounds:
            text, positions = words[-1]
            words[-1] = (text + token.removeprefix(CONTINUES), [*positions, position])
        else:
            words.append((token if token in bounds else token.removeprefix(CONTINUES), [position]))
        goes_on = token in _JOINERS
    return words
