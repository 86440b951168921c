"""The process that writes checkpoints, so that training waits for a copy in memory and never for a disk.

    python -m captioning.checkpoint_writer <descriptor>

Requests come as lines of JSON on standard input, answers go to standard output. The descriptor is of the memory that
holds the tensors' file. It ends when its input does: when the trainer closes it or dies. A save under way is completed
first, which is why it holds the trainer's lock too and does not listen to SIGTERM and SIGINT. It imports no torch.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import xxhash

from captioning import storage

PREFIX = "step-"
BLOCK = 4096  # what O_DIRECT asks of sizes and places
TENSORS, PLAIN, JOURNAL = "state.safetensors", "state.json", "journal.jsonl"


def checkpoint_folders(folder: Path) -> list[Path]:
    """Committed checkpoints, the newest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and path.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len(PREFIX) :]), reverse=True)


def write_past_cache(files: storage.Commit, name: str, memory: mmap.mmap) -> None:
    """`files.write` without the page cache: to copy into it and back out takes the memory's bandwidth from training.

    Where the filesystem does not offer that, it is `files.write`.
    """
    try:
        file = os.open(files.folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o644)
        try:
            _write_direct(file, memory)
        finally:
            os.close(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        files.write(name, memory)
        return
    files.files[name] = {"num_bytes": len(memory), "digest": xxhash.xxh3_128_hexdigest(memory)}


def _write_direct(file: int, memory: mmap.mmap) -> None:
    end, position = len(memory) - len(memory) % BLOCK, 0
    with memoryview(memory) as view:
        while position < end:
            with view[position : min(position + storage.CHUNK, end)] as part:
                position += os.write(file, part)
        fcntl.fcntl(file, fcntl.F_SETFL, 0)  # the last block is no whole one
        while position < len(memory):
            with view[position:] as part:
                position += os.write(file, part)
    os.fsync(file)


def write(request: dict[str, Any], descriptor: int) -> dict[str, Any]:
    """Commits one checkpoint, then prunes; never before, so that a failed save costs no old one."""
    started = time.monotonic()
    target = Path(request["folder"]) / f"{PREFIX}{request['about']['step']:08d}"
    with mmap.mmap(descriptor, request["num_bytes"], prot=mmap.PROT_READ) as memory:
        with storage.commit(target, request["about"]) as files:
            write_past_cache(files, TENSORS, memory)
            files.write(PLAIN, request["plain"].encode())
            files.write(JOURNAL, request["journal"].encode())
    for old in checkpoint_folders(target.parent)[request["keep"] :]:
        gone = old.with_name(f".{old.name}.tmp")
        os.replace(old, gone)  # so that a kill leaves no half of it behind
        storage.remove(gone)
    num_bytes = sum(file["num_bytes"] for file in files.files.values())
    return {"num_bytes": num_bytes, "seconds": time.monotonic() - started}


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group; the trainer still needs this process
    os.nice(19)  # whatever training leaves over is enough
    descriptor = int(sys.argv[1])
    for line in sys.stdin:
        try:
            answer = write(json.loads(line), descriptor)
        except OSError as error:
            answer = {"error": f"{error.strerror} ({error.filename})", "errno": error.errno}
        try:
            print(json.dumps(answer), flush=True)
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main()
