"""The first sentences of a caption as it was written: with its punctuation, and in any script with full stops."""

from __future__ import annotations

import re

# Each run of marks is read once, whatever follows it: hostile captions are megabytes of dots.
_END = re.compile(
    r"""(?P<wide>[。！？｡]++)["'”’»)\]」』）]*+ | (?<![.!?…．])(?P<mark>[.!?…．]++)["'”’»)\]]*+(?=\s|$)""", re.VERBOSE
)
_FOLLOWING = re.compile(r"\s*(\S?)")
_LETTER = re.compile(r"[^\W\d_]")
_ABBREVIATIONS = frozenset("mr mrs ms dr prof st sr jr vs etc approx no ca cf inc ltd co dept fig".split())
_INITIALS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")  # the "U.S" of "U.S.", "p.m", "J"
_LONGEST_ABBREVIATION = 12


def first_sentences(text: str, count: int) -> str:
    """`text` up to the end of its sentence number `count`; all of it where it has no more.

    A sentence holds a letter and ends at `.`, `!` or `?` before a space, or at `。`, `！` or `？`. No end are the dots
    of abbreviations and initials ("Dr. Smith", "5 p.m. on"), and an ellipsis that no capital follows.
    """
    seen, done, holds_letter = 0, 0, False
    for match in _END.finditer(text):
        holds_letter = holds_letter or _LETTER.search(text, done, match.start()) is not None
        done = match.end()
        if holds_letter and _is_end(text, match):
            seen, holds_letter = seen + 1, False
            if seen == count:
                return text[:done]
    return text


def _is_end(text: str, match: re.Match[str]) -> bool:
    mark = match["mark"]
    if mark is None or "!" in mark or "?" in mark:
        return True
    if mark not in (".", "．"):
        following = _FOLLOWING.match(text, match.end())
        return following is None or not following[1] or following[1].isupper()
    return not _is_abbreviation(text[max(0, match.start() - _LONGEST_ABBREVIATION) : match.start()])


def _is_abbreviation(before: str) -> bool:
    """Whether the dot after `before` belongs to its last word."""
    if not before or before[-1].isspace():
        return False
    word = before.split()[-1].lstrip("\"'“‘(").lower()
    return word in _ABBREVIATIONS or _INITIALS.fullmatch(word) is not None
