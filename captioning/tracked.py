"""Outs of earlier stages, compared with the digests that DVC recorded when they were made.

DVC itself compares only size and time before a stage runs, so a flipped bit would be read silently. Feature files,
shards and model directories carry digests of their own and are not read twice here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from captioning import paths, storage
from captioning.errors import DamagedError

LOCK = Path("dvc.lock")


@cache
def _recorded(modified: int) -> dict[str, str]:
    """MD5 of each out that is a single file, by path; `modified` is the lock's time, so that a new one is read."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        stages: Any = (YAML(typ="safe").load(LOCK) or {}).get("stages", {})
        outs = [out for entry in stages.values() for out in entry.get("outs", [])]
        return {out["path"]: out["md5"] for out in outs if not out.get("md5", ".dir").endswith(".dir")}
    except (OSError, YAMLError, AttributeError, KeyError, TypeError, UnicodeDecodeError):
        return {}


def require(path: Path, stage: str) -> Path:
    """The path, if it holds something, and a file that DVC recorded if it still holds just that.

    Raises:
        CapstanError: missing or empty; says which stage makes it.
        DamagedError: other bytes than were recorded. It is set aside, so that the next `dvc repro` restores it.
    """
    paths.require(path, stage)
    if "DVC_STAGE" not in os.environ:
        return path  # by hand, a file may differ from what DVC recorded for good reasons
    expected = _recorded(LOCK.stat().st_mtime_ns).get(path.as_posix()) if LOCK.exists() else None
    if expected and hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != expected:
        aside = storage.set_aside(path)
        raise DamagedError(f"{path} has other bytes than dvc.lock recorded (kept as {aside}). Run `dvc repro` again.")
    return path


@contextmanager
def read_verified(out: Path) -> Iterator[None]:
    """Around reading an earlier stage's folder that carries digests of its own: a damaged one is set aside whole.

    Raises:
        DamagedError: what was found, and that DVC makes it anew.
    """
    try:
        yield
    except DamagedError as error:
        if "DVC_STAGE" in os.environ and os.environ.get("RANK", "0") == "0":
            aside = storage.set_aside(out)
            raise DamagedError(
                f"{error} ({out} is kept as {aside}). Run `dvc repro` again: DVC makes it anew."
            ) from error
        raise
