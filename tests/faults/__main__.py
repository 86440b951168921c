"""The fault matrix: COUNT cases, the fixed ones first, then random ones of SEED.

    PYTHONPATH=tests:. python -m faults --count 150 --seed 1

Each case is killed, damaged or starved through the real `dvc repro` in its own clone, and must recover. State lies in
`.work/faults/<digest of the code>`: stopped, it goes on where it was; changed code of the pipeline starts
over. A wrong case keeps its clone; `--only 37` runs that case again.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from clone import ROOT, TINY

from faults import web
from faults.cases import Case, draw_case
from faults.fixed import fixed_cases
from faults.runner import CaseRun, Missed, Reference, Result
from faults.survey import (
    CHECKPOINT_STEPS,
    SETTINGS,
    VARIANT_SETTINGS,
    VARIANTS,
    WEB,
    Survey,
    load_surveys,
    make_template,
    make_variant,
    template_of,
    variant,
)

NUM_ATTEMPTS = 6
KEPT = 4
"""Folders of earlier code that stay."""


def _digest(names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in [ROOT / name for name in names]:
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc")
        for file in files:
            digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def state_folder() -> Path:
    """Where the templates and the results of this code lie. The harness's own code is not in the name: see `known`."""
    return ROOT / ".work" / "faults" / _digest(["dvc.yaml", "params.yaml", "captioning", "stages"])


class Matrix:
    """The cases by number, and running them."""

    def __init__(self, folder: Path, seed: int, same_port: bool) -> None:
        """`same_port`: of the web server as when the templates were made."""
        self.folder, self.seed = folder, seed
        _make_templates(folder, same_port)
        self.surveys: dict[str, Survey] = load_surveys(folder)
        self.fixed = fixed_cases(self.surveys)
        self.references = {name: Reference.read(folder, name) for name in VARIANTS}
        self.lock = threading.Lock()

    def run(self, number: int) -> Result:
        """Case `number`, counted from 1: a fixed one, or a random one, which is drawn anew where it misses."""
        for attempt in range(NUM_ATTEMPTS):
            case = self.case(number, attempt)
            result = self._attempt(number, case)
            if result:
                result.attempts = attempt + 1
                return result
        return Result(title(case), [f"its fault did not come about in {NUM_ATTEMPTS} attempts"])

    def case(self, number: int, attempt: int = 0) -> Case:
        if number <= len(self.fixed):
            return self.fixed[number - 1]
        return draw_case(self.surveys, self.seed, number, attempt)

    def _attempt(self, number: int, case: Case) -> Result | None:
        folder = self.case_folder(number)
        try:
            result = CaseRun(self.references[variant(case.stage)], self.surveys, case, folder).run()
        except Missed:
            return None
        except Exception as error:  # noqa: BLE001  one case that breaks the harness must not stop the others
            place = traceback.extract_tb(error.__traceback__)[-1]
            result = Result(case.name, [f"{type(error).__name__}: {error} ({place.name}, line {place.lineno})"])
        result.name = title(case)
        if not result.problems:
            shutil.rmtree(folder)
        return result

    def case_folder(self, number: int) -> Path:
        return self.folder / "cases" / f"{self.seed}-{number}"

    @property
    def results(self) -> Path:
        return self.folder / f"results-{self.seed}.jsonl"

    def record(self, number: int, result: Result) -> None:
        with self.lock, self.results.open("a") as file:
            file.write(json.dumps({"number": number, **asdict(result)}) + "\n")

    def known(self, numbers: Sequence[int]) -> dict[int, Result]:
        """Results of an earlier, interrupted run. What went wrong, or is another case now, is run again."""
        found = {}
        for line in self.results.read_text().splitlines() if self.results.exists() else []:
            try:
                tree = json.loads(line)
            except ValueError:  # cut short
                continue
            number, result = tree.pop("number"), Result(**tree)
            if number in numbers and title(self.case(number, result.attempts - 1)) == result.name:
                found[number] = result
        return {number: result for number, result in found.items() if not result.problems}


def title(case: Case) -> str:
    """A case in a line."""
    return f"{case.stage:12s} {case.name}"


def _make_templates(folder: Path, same_port: bool) -> None:
    """Makes what is not there yet; `<template>.done` holds the digest of what it was made by."""
    settings = json.dumps([TINY, SETTINGS, CHECKPOINT_STEPS, VARIANTS, VARIANT_SETTINGS]).encode()
    made_by = f"{hashlib.sha256(settings).hexdigest()[:12]} {_digest(['tests/faults/web.py', 'tests/faults/inject'])}"
    for name in VARIANTS:
        done = folder / f"{template_of(folder, name).name}.done"
        if done.exists() and done.read_text() == made_by and (name != WEB or same_port):
            continue
        if name:
            make_variant(folder, name)
        else:
            make_template(folder)
        done.write_text(made_by)


def describe(number: int, result: Result, matrix: Matrix) -> str:
    """A progress line; where it went wrong, also why, and where to look."""
    if not result.problems:
        redone = f", {result.redone} redone" if result.redone else ""
        return f"{result.name}: recovered{redone}"
    lines = [f"{result.name}: WRONG", *(f"      {problem}" for problem in result.problems)]
    return "\n".join(
        [*lines, f"      see {matrix.case_folder(number)}; again: make faults SEED={matrix.seed} ONLY={number}"]
    )


def run_all(matrix: Matrix, numbers: Sequence[int], num_jobs: int, again: bool) -> dict[int, Result]:
    """Runs the cases, several at a time; unless `again`, those that have no result yet."""
    done = {} if again else matrix.known(numbers)
    if done:
        print(f"{len(done)} of {len(numbers)} cases were done before", flush=True)
    with ThreadPoolExecutor(num_jobs) as pool:
        waiting = {pool.submit(matrix.run, number): number for number in numbers if number not in done}
        try:
            for future in as_completed(waiting):
                number = waiting[future]
                done[number] = future.result()
                matrix.record(number, done[number])
                print(f"[{len(done):3d}/{len(numbers)}] {describe(number, done[number], matrix)}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return done


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Two matrices of one code would run in each other's clones. Raises SystemExit: another one is running."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another `make faults` is running in {folder}: wait for it, or stop it") from None
        yield


def forget_older(folder: Path) -> None:
    """Removes the state of code that is long gone."""
    others = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for other in [path for path in others if path != folder][KEPT:]:
        shutil.rmtree(other, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--count", type=int, default=150, help="cases in all: the fixed ones come first")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--only", type=int, nargs="*", help="these cases, by number, again")
    parser.add_argument("--list", action="store_true", help="name the cases, run none")
    args = parser.parse_args()
    started = time.monotonic()
    folder = state_folder()
    with alone_in(folder), web.serve(folder) as same_port:
        forget_older(folder)
        matrix = Matrix(folder, args.seed, same_port)
        if args.list:
            print("\n".join(f"{n:4d} {title(matrix.case(n))}" for n in range(1, args.count + 1)))
            return
        numbers = args.only or list(range(1, args.count + 1))
        results = run_all(matrix, numbers, args.jobs, again=bool(args.only))
    wrong = [number for number, result in results.items() if result.problems]
    minutes = (time.monotonic() - started) / 60
    print(f"{minutes:.1f} minutes; wrong: {', '.join(map(str, sorted(wrong))) or 'none'}")
    print(f"faults: {len(results)} injected, {len(results) - len(wrong)} recovered, {len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
