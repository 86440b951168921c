"""Measures everything beside its peer or its limit: `make bench` (O(40 min)), or `python -m benchmarks P1 P5` for some.

Writes benchmarks/results.json, in which the rows that were not measured stay as they are, and the table in README.md
and docs/performance.md.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

from benchmarks.measure import Row, machine, show
from benchmarks.table import write_table

RESULTS = Path(__file__).parent / "results.json"
ROWS: dict[str, list[tuple[str, str]]] = {
    "P1": [("training", "measure_training")],
    "P2": [("search", "measure_search")],
    "P3": [("extraction", "measure_extraction"), ("extraction", "measure_large_extraction")],
    "P4": [("extraction", "measure_cached_epoch")],
    "P5": [("checkpointing", "measure_checkpoints"), ("checkpointing", "measure_default_checkpoints")],
    "P6": [("loading", "measure_loading")],
    "P7": [("scoring", "measure_scoring")],
    "P8": [("pipeline", "measure_pipeline")],
    "P9": [("loading", "measure_memory")],
    "P10": [("startup", "measure_startup")],
}


def measures(name: str) -> Iterator[Callable[[], Row]]:
    for module, function in ROWS[name]:
        yield getattr(import_module(f"benchmarks.{module}"), function)


def main() -> None:
    wanted = sys.argv[1:] or list(ROWS)
    if unknown := [name for name in wanted if name not in ROWS]:
        sys.exit(f"unknown: {' '.join(unknown)}. Choices: {' '.join(ROWS)}")
    kept = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else {}
    for name in wanted:
        rows = [measure() for measure in measures(name)]
        about = {"date": datetime.date.today().isoformat(), "machine": machine()}
        kept[name] = [{**row, **about} for row in rows]
        for row in rows:
            show(row)
        # After each, so that a benchmark that is stopped keeps what it has.
        RESULTS.write_text(json.dumps({"results": {key: kept[key] for key in ROWS if key in kept}}, indent=1) + "\n")
    write_table(kept)


if __name__ == "__main__":
    main()
