"""The part of METEOR's paraphrase table that given captions can touch, so that METEOR starts in 0.6 s instead of 8.

The table has 5.3 million pairs of phrases. METEOR matches a phrase of a hypothesis with one of its reference where the
table pairs the two (Denkowski, Lavie 2014, Meteor Scoring). A pair that has no phrase of a reference, or beside it none
of a hypothesis, never matches, and every score is the same without it. Pairs in doubt are kept.

A pair is three lines: its probability, which METEOR 1.5 does not read, and two phrases of words with a space between.
"""

from __future__ import annotations

import gzip
import re
import tempfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from captioning.errors import CapstanError

LINES_PER_PAIR = 3
MAX_WORDS = 7
"""Pairs with a longer phrase are kept unseen; METEOR's table has none."""

CHUNK = 1 << 20
"""Bytes of the unpacked table that are looked at together."""

SLOT_BITS = 24
BASE, MODULUS = 0x9E3779B1, 1 << 32  # any odd base

Marks = NDArray[np.bool_]
"""(2 ** SLOT_BITS,): whether one of some phrases has this slot."""

_WORD = re.compile(rb"[a-z0-9]+")
_INNER_DOT = re.compile(rb"(?<=[a-z0-9])\.(?=[a-z0-9])")
_PLAIN = {*b"abcdefghijklmnopqrstuvwxyz0123456789\n"}
_DOUBT = bytes(0 if byte in _PLAIN else 1 if byte == ord(" ") else MAX_WORDS for byte in range(256))
"""Summed over a line: MAX_WORDS or more where the line has more words, or something else than plain words."""


def open_relevant(table: Path, references: Iterable[str], hypotheses: Iterable[str]) -> IO[bytes]:
    """The pairs of the table, packed as it is and in its order, that can match between these captions.

    O(2 s), whatever the captions. A few pairs too many are among them.

    Args:
        references, hypotheses: as METEOR gets them: PTB tokens, lower case.

    Returns:
        A file without a name, which no kill leaves behind.

    Raises:
        CapstanError: the table is damaged (METEOR would go on with what it could read of it).
    """
    marks = _mark(references), _mark(hypotheses)
    try:
        found = tempfile.TemporaryFile()
        with gzip.GzipFile(table) as source, gzip.GzipFile(fileobj=found, mode="wb", compresslevel=1) as target:
            _copy_relevant(source, target, *marks)
        found.flush()
    except (gzip.BadGzipFile, FileNotFoundError, EOFError, ValueError, zlib.error) as error:
        raise CapstanError(f"{table} cannot be read ({error}): install pycocoevalcap again") from error
    except OSError as error:
        where = tempfile.gettempdir()
        raise CapstanError(
            f"no room for METEOR's paraphrases in {where} ({error.strerror}): free some MB or set TMPDIR"
        ) from error
    return found


def _copy_relevant(source: gzip.GzipFile, target: gzip.GzipFile, references: Marks, hypotheses: Marks) -> None:
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(1) as pool:  # unpacking and NumPy leave the GIL alone
        for lines in _whole_pairs(source):
            waiting.append(pool.submit(_relevant, lines, references, hypotheses))
            if len(waiting) > 2:
                target.write(waiting.popleft().result())
        target.writelines(future.result() for future in waiting)


def _mark(captions: Iterable[str]) -> Marks:
    phrases = b"".join(phrase + b"\n" for phrase in _phrases(captions))
    marks = np.zeros(1 << SLOT_BITS, dtype=bool)
    marks[_slots(np.frombuffer(phrases, np.uint8))[1]] = True
    return marks


def _phrases(captions: Iterable[str]) -> set[bytes]:
    """Every phrase of plain words that METEOR can see in the captions.

    METEOR sets signs apart from words, and makes an abbreviation's `u.s.` `us`; it changes and joins nothing else. So
    its plain words are, in their order, the runs of letters and digits, with or without the dots between them.
    """
    found = {b""}
    for caption in captions:
        text = caption.lower().encode()
        for variant in {text, _INNER_DOT.sub(b"", text)}:
            words = _WORD.findall(variant)
            for length in range(1, MAX_WORDS + 1):
                found.update(b" ".join(words[i : i + length]) for i in range(len(words) - length + 1))
    return found


def _whole_pairs(table: gzip.GzipFile) -> Iterator[bytes]:
    """The table in pieces that end with a pair."""
    rest = b""
    while block := table.read(CHUNK):
        lines = rest + block
        end = len(lines)
        for _ in range(lines.count(b"\n") % LINES_PER_PAIR + 1):
            end = lines.rfind(b"\n", 0, end)
        rest = lines[end + 1 :]
        if end > 0:
            yield lines[: end + 1]
    if rest:
        raise ValueError("it ends within a pair")


def _relevant(lines: bytes, references: Marks, hypotheses: Marks) -> bytes:
    data = np.frombuffer(lines, np.uint8)
    if np.maximum(data[1:], data[:-1]).min(initial=255) <= ord(" "):
        return lines  # two spaces, or one at a line's end: our phrases have none, and METEOR's table has none
    ends, slots = _slots(data)
    doubt = _line_sums(np.frombuffer(lines.translate(_DOUBT), np.uint8), ends)
    matching = np.zeros(len(ends) // LINES_PER_PAIR, dtype=bool)
    first, second = (slice(n, None, LINES_PER_PAIR) for n in (1, 2))
    for phrase, other in ((first, second), (second, first)):
        matching |= references[slots[phrase]] & hypotheses[slots[other]]
        matching |= doubt[phrase] >= MAX_WORDS
    bounds = np.append(0, ends[second] + 1)
    pairs = np.flatnonzero(matching)
    return b"".join(lines[a:b] for a, b in zip(bounds[pairs].tolist(), bounds[pairs + 1].tolist(), strict=True))


def _slots(data: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Of each line its newline's place, and a number below 2 ** SLOT_BITS that few other lines have.

    A line's hash is the sum of its bytes times powers of BASE, counted from the line's start, modulo 2 ** 32.
    """
    ends = np.flatnonzero(data == ord("\n"))
    starts = np.append(0, ends[:-1] + 1)
    sums = _line_sums(data * _powers(BASE, len(data)), ends)
    hashes = sums * _powers(pow(BASE, -1, MODULUS), len(data))[starts]
    return ends, (hashes * np.uint32(BASE)) >> np.uint32(32 - SLOT_BITS)  # the upper bits depend on all bytes


def _line_sums(values: NDArray[np.unsignedinteger], ends: NDArray[np.int64]) -> NDArray[np.uint32]:
    return np.diff(np.cumsum(values, dtype=np.uint32)[ends], prepend=np.uint32(0))


def _powers(base: int, number: int) -> NDArray[np.uint32]:
    """base ** 0, base ** 1, ..., modulo 2 ** 32."""
    return _more_powers(base, 1 << number.bit_length())[:number]


@cache
def _more_powers(base: int, number: int) -> NDArray[np.uint32]:
    factors = np.full(number, base, dtype=np.uint32)
    factors[0] = 1
    return np.multiply.accumulate(factors, dtype=np.uint32)
