"""From captions to words: the PTB tokeniser that the published metrics use.

The PTB tokeniser takes a caption a line and answers with a line a caption, so nothing in a caption may end its line.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

from captioning.errors import CapstanError
from captioning.metrics.java import OPTIONS, QUICK_START, find_java, package_folder
from captioning.metrics.words import PUNCTUATIONS, single_line

JAR = "stanford-corenlp-3.4.1.jar"
TIMEOUT_S = 120.0
CAPTIONS_PER_S = 1000.0
"""A tenth of the slowest rate seen; it only sets when a stuck tokeniser is given up."""


def ptb_tokenize(captions_by_id: Mapping[str, Sequence[str]], timeout_s: float = TIMEOUT_S) -> dict[str, list[str]]:
    """Each caption's PTB tokens, lower case, without punctuation, joined by one space; one JVM call for all.

    The same tokens as pycocoevalcap's `PTBTokenizer`. A caption of nothing but punctuation becomes "".

    Raises:
        CapstanError: Java fails, hangs, or gives another number of lines than of captions.
    """
    lines = [single_line(caption) for captions in captions_by_id.values() for caption in captions]
    tokenized = iter(_tokenize_lines(lines, timeout_s + len(lines) / CAPTIONS_PER_S) if lines else [])
    return {image_id: [next(tokenized) for _ in captions] for image_id, captions in captions_by_id.items()}


def _tokenize_lines(lines: list[str], timeout_s: float) -> list[str]:
    jar = package_folder("tokenizer") / JAR
    command = [str(find_java()), *OPTIONS, *QUICK_START, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    text = "".join(f"{line}\n" for line in lines)
    try:
        answer = subprocess.run(
            [*command, "-preserveLines", "-lowerCase"], input=text.encode(), capture_output=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise CapstanError(f"the PTB tokeniser gave no answer for {len(lines)} captions in {timeout_s:.0f} s") from None
    except OSError as error:
        raise CapstanError(f"Java does not start ({error})") from error
    if answer.returncode:
        raise CapstanError(f"the PTB tokeniser failed: {answer.stderr.decode(errors='replace')[-500:].strip()}")
    tokenized = answer.stdout.decode().removesuffix("\n").split("\n")
    if len(tokenized) != len(lines):
        raise CapstanError(f"the PTB tokeniser gave {len(tokenized)} lines for {len(lines)} captions")
    return [" ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATIONS) for line in tokenized]
