"""The fault matrix: the fixed cases, then COUNT random ones of SEED.

    PYTHONPATH=tests:. python -m faults --count 150 --seed 1

Each case is killed, damaged or starved through the real `dvc repro` in its own clone, and must recover. State lies in
`.work/faults/<digest of the code>`: stopped, it goes on where it was; changed code starts over. A wrong case
keeps its clone; `--only 37` runs that case again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from clone import ROOT

from faults.cases import Case, draw_case
from faults.fixed import fixed_cases
from faults.runner import CaseRun, Missed, Reference, Result
from faults.survey import Survey, load_surveys, make_template

NUM_ATTEMPTS = 6
KEPT = 4
"""Folders of earlier code that stay."""


def state_folder() -> Path:
    """Where the template and the results of this code lie."""
    digest = hashlib.sha256()
    listed = ["dvc.yaml", "params.yaml", "tests/clone.py", "captioning", "stages", "tests/faults"]
    for name in listed:
        path = ROOT / name
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc")
        for file in files:
            digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return ROOT / ".work" / "faults" / digest.hexdigest()[:12]


class Matrix:
    """The cases by number, and running them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        if not (folder / "template-done").exists():
            make_template(folder)
            (folder / "template-done").touch()
        self.surveys: dict[str, Survey] = load_surveys(folder)
        self.fixed = fixed_cases(self.surveys)
        self.reference = Reference.read(folder)
        self.lock = threading.Lock()

    def run(self, number: int) -> Result:
        """Case `number`, counted from 1: a fixed one, or a random one, which is drawn anew where it misses."""
        num_attempts = 1 if number <= len(self.fixed) else NUM_ATTEMPTS
        for attempt in range(num_attempts):
            case = self.case(number, attempt)
            result = self._attempt(number, case)
            if result:
                result.attempts = attempt + 1
                return result
        return Result(f"{case.stage:9s} {case.name}", [f"its fault did not come about in {num_attempts} attempts"])

    def case(self, number: int, attempt: int = 0) -> Case:
        if number <= len(self.fixed):
            return self.fixed[number - 1]
        return draw_case(self.surveys, self.seed, number, attempt)

    def _attempt(self, number: int, case: Case) -> Result | None:
        folder = self.case_folder(number)
        try:
            result = CaseRun(self.reference, self.surveys, case, folder).run()
        except Missed:
            return None
        except Exception as error:  # noqa: BLE001  one case that breaks the harness must not stop the others
            place = traceback.extract_tb(error.__traceback__)[-1]
            result = Result(case.name, [f"{type(error).__name__}: {error} ({place.name}, line {place.lineno})"])
        result.name = f"{case.stage:9s} {case.name}"
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


def read_results(path: Path) -> dict[int, Result]:
    """Results of an earlier, interrupted run; a line cut short is run again."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            tree = json.loads(line)
        except ValueError:
            continue
        found[tree.pop("number")] = Result(**tree)
    return found


def describe(number: int, result: Result, matrix: Matrix) -> str:
    """A progress line; where it went wrong, also why, and where to look."""
    if not result.problems:
        redone = f", {result.redone} redone" if result.redone else ""
        return f"{result.name}: recovered{redone}"
    lines = [f"{result.name}: WRONG", *(f"      {problem}" for problem in result.problems)]
    return "\n".join(
        [*lines, f"      see {matrix.case_folder(number)}; again: make faults SEED={matrix.seed} ONLY={number}"]
    )


def run_all(matrix: Matrix, numbers: Sequence[int], num_jobs: int) -> dict[int, Result]:
    """Runs the cases that have no result yet, several at a time."""
    done = {number: result for number, result in read_results(matrix.results).items() if number in numbers}
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


def forget_older(folder: Path) -> None:
    """Removes the state of code that is long gone."""
    others = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for other in [path for path in others if path != folder][KEPT:]:
        shutil.rmtree(other, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--count", type=int, default=150, help="random cases")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--only", type=int, help="one case, by number, again")
    parser.add_argument("--stages", nargs="*", help="only cases of these stages")
    args = parser.parse_args()
    started = time.monotonic()
    matrix = Matrix(state_folder(), args.seed)
    forget_older(matrix.folder)
    if args.only:
        result = matrix.run(args.only)
        print(describe(args.only, result, matrix))
        sys.exit(bool(result.problems))
    numbers = list(range(1, len(matrix.fixed) + args.count + 1))
    if args.stages:
        numbers = [n for n in numbers if matrix.case(n).stage in args.stages]
    results = run_all(matrix, numbers, args.jobs)
    wrong = [number for number, result in results.items() if result.problems]
    minutes = (time.monotonic() - started) / 60
    print(f"{minutes:.1f} minutes; wrong: {', '.join(map(str, sorted(wrong))) or 'none'}")
    print(f"faults: {len(results)} injected, {len(results) - len(wrong)} recovered, {len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
