"""Work in progress: `.work/<stage>/<fingerprint>/` survives every kill, and one process at a time may write into it.

The fingerprint is a digest of all that the result depends on, so changed settings never find stale work and reverted
settings find their own again. Work is kept after its outs are published: where a kill comes before DVC has recorded the
stage, DVC deletes the outs and runs the stage again, which then only publishes. `prune` removes it later.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from captioning import paths, storage
from captioning.orphans import Holder, describe_self, stop_orphan

if TYPE_CHECKING:
    from captioning.distributed import World

ABOUT, PUBLISHED = "work.json", "published.json"
POLL_S = 0.1
DAY_S = 86400


@cache
def code_files(stage: str) -> tuple[Path, ...]:
    """The code deps of a stage in dvc.yaml (a test compares them with what it imports); none outside a repository."""
    from ruamel.yaml import YAML

    flow = Path("dvc.yaml")
    stages = (YAML(typ="safe").load(flow) if flow.exists() else {}).get("stages", {})
    for entry in stages.values():
        if f"stages.{stage}" in entry["cmd"].split():
            return tuple(Path(dep) for dep in entry["deps"] if dep.endswith(".py"))
    return ()


def fingerprint(stage: str, params: Any, inputs: Sequence[Path] = (), packages: Sequence[str] = ()) -> str:
    """A name for work in progress.

    Args:
        params: anything JSON can write: resolved params, world size, digests of inputs that carry their own.
        inputs: files and directories whose contents matter.
        packages: distributions whose versions matter.
    """
    versions = {name: version(name) for name in packages}
    digests = [(path.name, storage.digest_tree(path)) for path in [*inputs, *code_files(stage)]]  # wherever they lie
    text = json.dumps([stage, params, digests, versions], sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode())[:16]


@dataclass(frozen=True)
class Work:
    """A stage's work folder, locked."""

    stage: str
    folder: Path
    lock: int
    """Descriptor of the lock; a child that may outlive this process for a moment inherits it."""

    @property
    def name(self) -> str:
        """The fingerprint."""
        return self.folder.name

    def published(self) -> None:
        """Notes that the outs are in place, so that the folder can go once DVC has recorded them."""
        name, lock = _stage_name(self.stage), Path(os.path.abspath(LOCK))
        note = {"stage": name, "lock": str(lock), "entry": _recorded_entries(lock).get(name)}
        storage.write_json(self.folder / PUBLISHED, note)


LOCK = "dvc.lock"


def _stage_name(stage: str) -> str:
    return os.environ.get("DVC_STAGE", stage)


@contextmanager
def open_work(stage: str, name: str, about: Any = None, world: World | None = None) -> Iterator[Work]:
    """Makes, locks and yields `.work/<stage>/<name>`.

    A process that DVC started and that outlived DVC is told to stop and waited for; any other holder is waited for.

    Args:
        about: kept in the folder for people (`python -m captioning checkpoints list`).
        world: several processes that do this work; the main one locks, the others wait until it has.
    """
    folder = paths.work_root() / stage / name
    if world is not None and not world.is_main:
        world.wait()
        yield Work(stage, folder, -1)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(folder.with_name(f"{name}.lock"))
    try:
        folder.mkdir(exist_ok=True)
        storage.remove(folder / PUBLISHED)
        for leftover in list(folder.rglob(".*.tmp")):  # of a killed write; nobody else can be writing now
            storage.remove(leftover)
        storage.write_json(folder / ABOUT, {"stage": _stage_name(stage), "about": about})
        if world is not None:
            world.wait()
        yield Work(stage, folder, descriptor)
    finally:
        os.close(descriptor)


def _acquire(path: Path) -> int:
    told: Holder | None = None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            holder = Holder.read(path)
            if holder and not stop_orphan(holder) and holder != told and holder.is_alive():
                told = holder
                print(f"waiting for process {holder.pid}, which does the same work", flush=True)
            time.sleep(POLL_S)
            continue
        if _is_still(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, describe_self())
            return descriptor
        os.close(descriptor)  # pruned while we waited


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def prune(keep_days: float, min_free_bytes: int, force: bool = False) -> list[Path]:
    """Removes work that nobody needs; work in use is left alone.

    That is: published, and recorded anew in dvc.lock since; or of a stage that dvc.lock records, and older than
    `keep_days` or, while the disk has less than `min_free_bytes` left, all but the stage's latest, the oldest first.
    `force`: all of it.

    Returns:
        The removed folders.
    """
    root = paths.work_root()
    folders = sorted((about.parent for about in root.glob(f"*/*/{ABOUT}")), key=_last_use)
    recorded = _recorded_entries(Path(LOCK))
    latest = {_stage_of(folder): folder for folder in folders}  # sorted: the last one stays
    removed = []
    for folder in folders:
        stage = _stage_of(folder)
        is_old = _age_s(folder) > keep_days * DAY_S
        in_the_way = folder != latest[stage] and _free_bytes(root) < min_free_bytes
        if force or _is_recorded(folder) or (stage in recorded and (is_old or in_the_way)):
            removed += [folder] if _remove(folder) else []
    return removed


def _last_use(folder: Path) -> float:
    try:
        return (folder / ABOUT).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _age_s(folder: Path) -> float:
    return time.time() - _last_use(folder)


def _free_bytes(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def _stage_of(folder: Path) -> str:
    return str(read_note(folder / ABOUT).get("stage"))


def read_note(path: Path) -> dict[str, Any]:
    """`work.json` or `published.json` of a work folder; empty where it is missing or damaged."""
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _recorded_entries(lock: Path) -> dict[str, str]:
    """A digest of each stage's entry in dvc.lock: what stands below a key two spaces in."""
    try:
        lines = lock.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    entries: dict[str, list[str]] = {}
    current: list[str] = []
    for line in lines:
        if line.startswith("  ") and line[2:3] not in (" ", "-", ""):
            current = entries.setdefault(line.strip(" :"), [])
        current.append(line)
    return {name: xxhash.xxh3_128_hexdigest("\n".join(entry).encode()) for name, entry in entries.items()}


def _is_recorded(folder: Path) -> bool:
    """Whether DVC has written another entry for this stage since the outs were published."""
    note = read_note(folder / PUBLISHED)
    entry = _recorded_entries(Path(str(note.get("lock")))).get(str(note.get("stage")))
    return entry is not None and entry != note.get("entry")


def _remove(folder: Path) -> bool:
    path = folder.with_name(f"{folder.name}.lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        storage.remove(folder)
        path.unlink(missing_ok=True)
    except OSError:  # in use, or not ours to delete
        return False
    finally:
        os.close(descriptor)
    return True
