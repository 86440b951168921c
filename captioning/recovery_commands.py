"""What the user's commands do about crashes: mend DVC's files after a kill, and show, check or clear checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from captioning import paths, storage, work
from captioning.checkpoint_writer import checkpoint_folders

RWLOCK = Path(".dvc/tmp/rwlock")
LOCK = Path("dvc.lock")


def heal() -> list[str]:
    """Mends what a kill can leave of DVC's files and what DVC then refuses to start with.

    An unparsable `.dvc/tmp/rwlock` is removed: it only says which processes use which files, and none of those lives.
    An unparsable `dvc.lock` is set aside and git's is put in its place; DVC's run cache finds what ran since.

    Returns:
        A line for each thing mended.
    """
    done = []
    if RWLOCK.exists() and not _is_json(RWLOCK):
        RWLOCK.unlink()
        done.append(f"{RWLOCK} was cut short by a kill: removed")
    if LOCK.exists() and not _is_lock(LOCK):
        os.replace(LOCK, LOCK.with_name(f"{LOCK}.corrupt"))
        restored = subprocess.run(["git", "checkout", "--quiet", "--", str(LOCK)], capture_output=True).returncode == 0
        done.append(
            f"{LOCK} was damaged: kept as {LOCK}.corrupt, {'restored from git' if restored else 'git has none'}"
        )
    return done


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text("utf-8")), dict)
    except ValueError:
        return False


def _is_lock(path: Path) -> bool:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        tree = YAML(typ="safe").load(path.read_text("utf-8"))
    except (YAMLError, UnicodeDecodeError):
        return False
    return isinstance(tree, dict) and isinstance(tree.get("stages", {}), dict)


def list_checkpoints() -> list[str]:
    """A line for each checkpoint below `.work`, by stage, the newest first; damaged ones are named as such."""
    return [_describe(stage, folder) for stage, folder in _checkpoints()]


def verify_checkpoints() -> tuple[list[str], int]:
    """Reads every byte of every checkpoint. Returns a line for each, and how many are damaged."""
    lines, num_damaged = [], 0
    for stage, folder in _checkpoints():
        started = time.monotonic()
        try:
            num_bytes = storage.verify(folder)
        except storage.DamagedError as error:
            lines.append(f"damaged  {stage}  {error}")
            num_damaged += 1
            continue
        lines.append(f"good     {stage}  {folder}  {num_bytes / 1e6:.1f} MB in {time.monotonic() - started:.2f} s")
    return lines, num_damaged


def prune_work(keep_days: float, min_free_bytes: int, force: bool) -> list[str]:
    """Removes old work as every stage does when it starts; `force`: all that no process uses."""
    removed = work.prune(keep_days, min_free_bytes, force)
    return [f"removed {folder}" for folder in removed]


def _checkpoints() -> list[tuple[str, Path]]:
    found = []
    for about in sorted(paths.work_root().glob(f"*/*/{work.ABOUT}")):
        stage = str(work.read_note(about).get("stage"))
        found += [(stage, folder) for folder in checkpoint_folders(about.parent / "checkpoints")]
        found += [(stage, folder) for folder in sorted((about.parent / "checkpoints").glob("*.corrupt"))]
    return found


def _describe(stage: str, folder: Path) -> str:
    try:
        manifest: dict[str, Any] = storage.read_manifest(folder)
    except storage.DamagedError:
        return f"{stage}  damaged  {folder}"
    num_bytes = sum(file["num_bytes"] for file in manifest["files"].values())
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(folder.stat().st_mtime))
    where = f"step {manifest['about']['step']}, {manifest['about']['epoch']} epochs done"
    state = "set aside" if folder.suffix == ".corrupt" else where
    return f"{stage}  {state}  {num_bytes / 1e6:.1f} MB  {saved}  {folder}"
