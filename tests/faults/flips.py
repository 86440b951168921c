"""Single-bit flips and truncations in every file format that we write: refused, or harmless, but never silent.

    PYTHONPATH=tests:. python -m faults.flips --count 1000

COUNT flips and as many truncations a format, drawn with SEED. A damaged file must be refused (CapstanError, or set
aside), or give exactly the undamaged content (a bit of padding); anything else is silent and an error.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from captioning.errors import CapstanError
from faults.damage import flip_bit
from faults.formats import FORMATS, Format

REFUSED, HARMLESS, SILENT, CRASHED, HUNG = VERDICTS = ("refused", "harmless", "silent", "crashed", "hung")
SEARCHED = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
LIMIT_S = 20.0
"""A reader that takes longer hangs: HDF5 can loop for ever on one flipped bit. Only its process can be ended then."""


def verdict(form: Format, place: Path, expected: Any) -> str:
    """What the stages' reader does with what lies at `place` now."""
    try:
        found = form.read(place)
    except CapstanError:
        return REFUSED
    except Exception:  # noqa: BLE001  a user would see a traceback
        return CRASHED
    if found is None:
        return REFUSED
    return HARMLESS if found == expected else SILENT


def _damages(length: int, count: int, draw: random.Random) -> list[tuple[str, Callable[[bytes], bytes]]]:
    flips = [draw.randrange(8 * length) for _ in range(count)]
    cuts = [draw.randrange(length) for _ in range(count)]
    found: list[tuple[str, Callable[[bytes], bytes]]] = []
    found += [(f"bit {bit}", lambda content, bit=bit: flip_bit(content, bit)) for bit in flips]
    found += [(f"cut to {end} bytes", lambda content, end=end: content[:end]) for end in cuts]
    return found


def check_format(form: Format, count: int, draw: random.Random, first: int = 0) -> Iterator[tuple[str, str]]:
    """Damages number `first` and on: (verdict, what was done). Runs in the working directory, which is empty."""
    place = form.make()
    whole = {path: path.read_bytes() for path in ([place] if place.is_file() else sorted(place.iterdir()))}
    expected = form.read(place)
    targets = [path for path in whole if place.is_file() or path.match(form.damaged)]
    assert targets and expected == form.read(place), "two readings of a whole file are equal"
    damages = _damages(min(len(whole[path]) for path in targets), count, draw)
    for number, (what, damage) in list(enumerate(damages))[first:]:
        path = targets[number % len(targets)]
        path.write_bytes(damage(whole[path]))
        with contextlib.redirect_stdout(io.StringIO()):
            found = verdict(form, place, expected)
        yield found, f"{path.name}, {what}"
        _restore(place, whole)


def _restore(place: Path, whole: dict[Path, bytes]) -> None:
    for aside in place.parent.rglob("*.corrupt"):
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
    for path, content in whole.items():
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)


def watch(name: str, count: int, seed: int) -> list[tuple[str, str]]:
    """`check_format` in a process of its own, which is replaced where a reader hangs."""
    found: list[tuple[str, str]] = []
    while len(found) < 2 * count:
        options = ["--count", str(count), "--seed", str(seed), "--format", name, "--first", str(len(found))]
        command = [sys.executable, "-W", "ignore", "-m", "faults.flips", *options]
        with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+b") as log:
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(SEARCHED)}
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log)
            _wait_while_it_moves(process, Path(folder) / "log")
            log.seek(0)
            found += [tuple(json.loads(line)) for line in log.read().decode().splitlines()]
        if process.returncode == -signal.SIGKILL:
            found.append((HUNG, f"damage {len(found)}"))
        elif process.returncode:
            raise SystemExit(f"{name}: exit status {process.returncode}")
    return found


def _wait_while_it_moves(process: subprocess.Popen[bytes], log: Path) -> None:
    size, since = -1, time.monotonic()
    while process.poll() is None:
        if log.stat().st_size != size:
            size, since = log.stat().st_size, time.monotonic()
        elif time.monotonic() - since > LIMIT_S:
            process.kill()
            process.wait()
        time.sleep(0.02)


def run(count: int, seed: int) -> int:
    """All formats, a table on the console. Returns how many damages were silent, or crashed or hung the reader."""
    shown, num_bad = [], 0
    print(f"{'format':24s}" + "".join(f"{verdict:>9s}" for verdict in VERDICTS))
    for name in FORMATS:
        found = watch(name, count, seed)
        verdicts = Counter(verdict for verdict, _ in found)
        print(f"{name:24s}" + "".join(f"{verdicts[verdict]:9d}" for verdict in VERDICTS), flush=True)
        bad = [f"{name}: {what}: {verdict}" for verdict, what in found if verdict not in (REFUSED, HARMLESS)]
        num_bad += len(bad)
        shown += bad[:3]
    print(*shown, sep="\n")
    return num_bad


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m faults.flips", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="flips, and as many truncations, a format")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--format", help="this one alone, in the working directory, a line of JSON a damage")
    parser.add_argument("--first", type=int, default=0, help="with --format: the number of the first damage")
    args = parser.parse_args()
    if args.format:
        draw = random.Random(f"{args.seed} {args.format}")
        for verdict_and_what in check_format(FORMATS[args.format], args.count, draw, args.first):
            print(json.dumps(verdict_and_what), flush=True)
        return
    num_bad = run(args.count, args.seed)
    print(f"flips: {args.count} per format, {num_bad} silent")
    sys.exit(bool(num_bad))


if __name__ == "__main__":
    main()
