"""METEOR 1.5 through its jar's line protocol, made safe against odd captions and a dead or stuck JVM.

Denkowski, Lavie: "Meteor Universal: Language Specific Translation Evaluation for Any Target Language" (WMT 2014).
`SCORE ||| reference ||| ... ||| hypothesis` is answered with one line of statistics, `EVAL ||| statistics ||| ...` with
a score a line and then the score of all. Every answer is checked, so that no line is ever taken for another's.
"""

from __future__ import annotations

import os
import queue
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import IO, TypeVar

import numpy as np
from numpy.typing import NDArray

from captioning.errors import CapstanError
from captioning.metrics.java import OPTIONS, QUICK_START, find_java, package_folder
from captioning.metrics.words import single_line

JAR = "meteor-1.5.jar"
PARAPHRASES = Path("data", "paraphrase-en.gz")
NUM_STATISTICS = 23
TIMEOUT_S = 300.0
"""The longest wait for one line. Two 1000-word captions take about a second."""

CAPTIONS_AT_ONCE = 125
"""Few enough that processes end together, so many that they seldom wait for us."""

MAX_PROCESSES = 8

_SEPARATOR = re.compile(r"\|{3,}")

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def paraphrase_table() -> Path:
    """Raises CapstanError: pycocoevalcap is not installed."""
    return package_folder("meteor") / PARAPHRASES


class Meteor:
    """METEOR processes. Use as a context manager; they start in the background.

    Args:
        paraphrases: what `paraphrases.open_relevant` gives for all captions that will be scored, so that a process
            starts in 0.6 s; None: the whole table, in 8 s or more.
        num_processes: a process takes 0.2 GB.

    Raises:
        CapstanError: Java is missing, or (in any method) a process died, hangs or answers what it should not.
    """

    def __init__(
        self, paraphrases: IO[bytes] | None = None, num_processes: int = 1, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._pool = ThreadPoolExecutor(num_processes, "meteor")
        self._processes: list[_Process] = []
        self._free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        try:
            for _ in range(num_processes):
                self._processes.append(_Process(paraphrases, timeout_s))
                self._free.put(self._processes[-1])
        except BaseException:
            self.close()
            raise

    def score(
        self, references: Sequence[Sequence[str]], hypotheses: Sequence[str], groups: Sequence[Sequence[int]]
    ) -> tuple[list[float], NDArray[np.float64]]:
        """Scores captions that are already tokenised.

        Args:
            references: per image, its references.
            hypotheses: per image, the caption. An empty one scores 0.
            groups: sets of image indices.

        Returns:
            Each group's score (from its summed statistics, not a mean of scores), and each image's score.
        """
        lines = [
            " ||| ".join(["SCORE", *map(_field, captions), _field(hypothesis)])
            for captions, hypothesis in zip(references, hypotheses, strict=True)
        ]
        starts = range(0, len(lines), CAPTIONS_AT_ONCE)
        parts = self._share(lambda process, at: process.ask(lines[at : at + CAPTIONS_AT_ONCE], NUM_STATISTICS), starts)
        statistics = [line for part in parts for line in part]
        everything = tuple(range(len(statistics)))
        different = list(dict.fromkeys([everything, *map(tuple, groups)]))
        answers = self._share(lambda process, group: process.evaluate([statistics[i] for i in group]), different)
        scores = dict(zip(different, answers, strict=True))
        return [scores[tuple(group)][-1] for group in groups], np.array(scores[everything][:-1], dtype=np.float64)

    def _share(self, work: Callable[[_Process, Item], Answer], items: Iterable[Item]) -> list[Answer]:
        """The items' answers in their order; each process takes the next item when it is free."""

        def with_process(item: Item) -> Answer:
            process = self._free.get()
            try:
                return work(process, item)
            finally:
                self._free.put(process)

        return list(self._pool.map(with_process, items))

    def close(self) -> None:
        """Ends the processes. Safe to call twice, and from another thread than the one that waits for scores."""
        for process in self._processes:
            process.close()
        self._pool.shutdown()

    def __enter__(self) -> Meteor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _Process:
    """One process, asked by one thread at a time."""

    def __init__(self, paraphrases: IO[bytes] | None, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        folder = package_folder("meteor")
        command = [str(find_java()), *OPTIONS, *QUICK_START, "-Xmx2G", "-jar", JAR]
        command += ["-", "-", "-stdio", "-l", "en", "-norm"]
        inherited = () if paraphrases is None else (paraphrases.fileno(),)
        for descriptor in inherited:
            command += ["-a", f"/proc/self/fd/{descriptor}"]  # opened anew, so each process reads it from its start
        self._errors = tempfile.TemporaryFile()
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                command, cwd=folder, stdin=pipe, stdout=pipe, stderr=self._errors, pass_fds=inherited
            )
        except OSError as error:
            raise CapstanError(f"Java does not start ({error})") from error
        self._answers: queue.Queue[str | None] = queue.Queue()
        Thread(target=self._read, name="meteor-answers", daemon=True).start()

    def evaluate(self, statistics: list[str]) -> list[float]:
        """Scores of the given statistics, then the score of all of them together."""
        if not statistics:
            return [0.0]
        answers = self.ask([" ||| ".join(["EVAL", *statistics])], 1, len(statistics) + 1)
        return [float(answer) for answer in answers]

    def ask(self, lines: list[str], num_numbers: int, num_answers: int | None = None) -> list[str]:
        """Sends lines and takes as many answers, each of `num_numbers` finite numbers."""
        # Writing from a thread of its own: with both pipes full, a single thread would wait for ever.
        Thread(target=self._write, args=(lines,), name="meteor-lines", daemon=True).start()
        answers = []
        for number in range(num_answers or len(lines)):
            answer = self._next_answer()
            if not _is_numbers(answer, num_numbers):
                raise CapstanError(f"METEOR answered {answer[:200]!r} to line {number + 1}, not {num_numbers} numbers")
            answers.append(answer)
        return answers

    def _next_answer(self) -> str:
        try:
            answer = self._answers.get(timeout=self._timeout_s)
        except queue.Empty:
            self._process.kill()
            raise CapstanError(f"METEOR gave no answer in {self._timeout_s:.0f} s and was stopped") from None
        if answer is None:
            self._answers.put(None)
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read()[-500:].decode(errors="replace").strip()
            raise CapstanError(f"METEOR's Java process ended (exit code {code}): {said or 'it said nothing'}")
        return answer

    def _write(self, lines: list[str]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("".join(f"{line}\n" for line in lines).encode())
            self._process.stdin.flush()
        except (OSError, ValueError):
            return  # a dead or closed process: `_next_answer` reports it

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line.decode(errors="replace").strip())
        self._answers.put(None)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()


def num_useful_processes(num_captions: int) -> int:
    """How many end soonest: a process must start (0.6 s), and then a core takes about 1000 captions a second."""
    return min(len(os.sched_getaffinity(0)), 1 + num_captions // 500, MAX_PROCESSES)


def _field(caption: str) -> str:
    return _SEPARATOR.sub(" ", single_line(caption)).replace("  ", " ").strip()


def _is_numbers(answer: str, num_numbers: int) -> bool:
    try:
        values = [float(word) for word in answer.split()]
    except ValueError:
        return False
    return len(values) == num_numbers and bool(np.isfinite(values).all())
