"""Which of the project's modules a stage imports, read from the sources (also imports within functions)."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]

HEALTH = ("alerts", "health_records", "monitoring", "probes", "thresholds")
PARAMS = (
    *("decoder_params", "logging_params", "param_errors", "param_types", "params"),
    *("source_params", "tokenizer_params", "train_params"),
)
LOGS = tuple(
    f"run_logs/{name}"
    for name in ("__init__", "looks", "process", "records", "tensorboard_sink", "wandb_sink", "writer")
)
PLUMBING = {
    f"captioning/{name}.py"
    for name in ("__init__", "errors", "interruption", "orphans", "paths", "progress", "stage", *PARAMS, *HEALTH, *LOGS)
}
"""Modules that cannot change a result: DVC compares the values of params.yaml themselves (no field has a default, which
a test holds), and the rest says where files lie, who is alive, and how things look on a terminal."""


@cache
def direct_imports(path: Path) -> frozenset[Path]:
    """Files of `captioning` and `stages` that one file imports, with the packages' `__init__.py` that run on the way.

    Imports for type checkers alone do not count.
    """
    found: set[Path] = set()
    for node in _running_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            found.update(_files(name))
    return frozenset(found - {path})


def _running_nodes(tree: ast.AST):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _running_nodes(node)


def _files(name: str) -> list[Path]:
    parts = name.split(".")
    if parts[0] not in ("captioning", "stages"):
        return []
    files = [ROOT.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts) + 1)]
    return [file for file in [*files, ROOT.joinpath(*parts).with_suffix(".py")] if file.exists()]


def import_closure(path: Path) -> set[str]:
    """All files that a stage runs, itself included, without the plumbing; relative to the repository's root."""
    seen, waiting = {path}, [path]
    while waiting:
        file = waiting.pop()
        if str(file.relative_to(ROOT)) in PLUMBING:
            continue  # nor can what it imports, unless a stage imports that, too
        for found in direct_imports(file) - seen:
            seen.add(found)
            waiting.append(found)
    names = {str(file.relative_to(ROOT)) for file in seen}
    return names - PLUMBING - {"stages/__init__.py"}


if __name__ == "__main__":
    for script in sorted((ROOT / "stages").glob("[!_]*.py")):
        print(f"{script.stem}:", *(f"    - {name}" for name in sorted(import_closure(script))), sep="\n")
