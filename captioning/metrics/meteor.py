"""METEOR 1.5 through its jar's line protocol, made safe against odd captions and a dead or stuck JVM.

Denkowski, Lavie: "Meteor Universal: Language Specific Translation Evaluation for Any Target Language" (WMT 2014).
`SCORE ||| reference ||| ... ||| hypothesis` is answered with one line of statistics, `EVAL ||| statistics ||| ...` with
a score a line and then the score of all. Every answer is checked, so that no line is ever taken for another's.
"""

from __future__ import annotations

import queue
import re
import subprocess
import tempfile
from collections.abc import Sequence
from threading import Thread
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from captioning.errors import CapstanError
from captioning.metrics.java import OPTIONS, find_java, package_folder
from captioning.metrics.words import single_line

JAR = "meteor-1.5.jar"
NUM_STATISTICS = 23
TIMEOUT_S = 300.0
"""The longest wait for one line. Two 1000-word captions take about a second."""

_SEPARATOR = re.compile(r"\|{3,}")


def _field(caption: str) -> str:
    return _SEPARATOR.sub(" ", single_line(caption)).replace("  ", " ").strip()


class Meteor:
    """A METEOR process. Use as a context manager; start-up takes some seconds and runs in the background.

    Raises:
        CapstanError: Java is missing, or (in any method) the process died, hangs or answers what it should not.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        folder = package_folder("meteor")
        command = [
            str(find_java()),
            *OPTIONS,
            "-Xmx2G",
            "-XX:+UseSerialGC",
            "-jar",
            JAR,
            "-",
            "-",
            "-stdio",
            "-l",
            "en",
            "-norm",
        ]
        self._errors = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
            )
        except OSError as error:
            raise CapstanError(f"Java does not start ({error})") from error
        self._answers: queue.Queue[str | None] = queue.Queue()
        Thread(target=self._read, name="meteor-answers", daemon=True).start()

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
        statistics = self._ask(lines, NUM_STATISTICS)
        group_scores = [self._evaluate([statistics[i] for i in group])[-1] for group in groups]
        image_scores = self._evaluate(statistics)[:-1]
        return group_scores, np.array(image_scores, dtype=np.float64)

    def _evaluate(self, statistics: list[str]) -> list[float]:
        """Scores of the given statistics, then the score of all of them together."""
        if not statistics:
            return [0.0]
        answers = self._ask([" ||| ".join(["EVAL", *statistics])], 1, len(statistics) + 1)
        return [float(answer) for answer in answers]

    def _ask(self, lines: list[str], num_numbers: int, num_answers: int | None = None) -> list[str]:
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
        """Ends the process. Safe to call twice."""
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def __enter__(self) -> Meteor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _is_numbers(answer: str, num_numbers: int) -> bool:
    try:
        values = [float(word) for word in answer.split()]
    except ValueError:
        return False
    return len(values) == num_numbers and bool(np.isfinite(values).all())
