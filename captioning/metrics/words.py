"""From captions to words without Java, for validation while training; published scores use `tokenizer`."""

from __future__ import annotations

import re

PUNCTUATIONS = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""Tokens that are dropped, as pycocoevalcap lists them (its tokens are lower case, so `-lrb-` stays)."""

LINE_ENDS = re.compile("[\n\r\t\x0b\x0c\x00\x1c-\x1f\x85\u2028\u2029]+")
"""Whatever Python, Java or the tokeniser takes as the end of a line, and what could be taken as the end of a text."""

_CLITICS = re.compile(r"(?<=\w)('(?:s|m|d|re|ve|ll))\b")
_NEGATION = re.compile(r"(?<=\w)(n't)\b")
_TOKEN = re.compile(r"n't\b|'(?:s|m|d|re|ve|ll)\b|\d+(?:[.,:]\d+)+|\w+(?:-\w+)*|\.\.\.|--|[^\w\s]")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_QUOTES = str.maketrans('\u2018\u2019\u201c\u201d"\u2013\u2014', "'" * 5 + "--")


def single_line(text: str) -> str:
    """The caption without anything that a line-based program could take as a line's end."""
    return LINE_ENDS.sub(" ", text).encode("utf-8", errors="replace").decode("utf-8")


def simple_tokenize(text: str) -> list[str]:
    """Words as the PTB tokeniser gives them for everyday captions: lower case, clitics apart, no punctuation.

    For validation while training; published scores use `ptb_tokenize`.
    """
    text = text.lower().translate(_QUOTES)
    text = _CLITICS.sub(r" \1", _NEGATION.sub(r" \1", text))
    return [_BRACKETS.get(token, token) for token in _TOKEN.findall(text) if token not in PUNCTUATIONS]
