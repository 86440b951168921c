"""A training run's log in Weights & Biases and TensorBoard: only plumbing, nothing here changes or ends a run.

The trainer appends records to `.work/logs/<captioner>/<fingerprint>/records.jsonl` (`records`), and a process of its
own hands them on (`writer`): so neither package can draw from the trainer's random numbers, take its signals, or make
it wait for a network. A record belongs to one entry of the run's journal. A resumed run begins the file anew with the
entries of its checkpoint, and everything is written again from there, so nothing is in it twice.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning.errors import CapstanError

if TYPE_CHECKING:
    from captioning.logging_params import LoggingParams
    from captioning.run_logs.records import RunLog


def check_installed(settings: LoggingParams) -> None:
    """Raises CapstanError where a package is missing that params.yaml asks for. Imports none of them."""
    for name in settings.sinks:
        if find_spec(name) is None:
            off = "disabled" if name == "wandb" else "false"
            raise CapstanError(
                f"logging.{name} asks for a package that is not installed: `pip install` {name} in the version that "
                f"requirements.txt names, or set logging.{name} to {off}"
            )


def open_log(settings: LoggingParams, folder: Path, name: str, params: Any) -> RunLog | None:
    """The log of one run of a captioner, in `<folder>/<name>`; None where all of it is off.

    Args:
        folder: named like the captioner.
        name: the run's fingerprint.
        params: plain values, shown beside the curves.
    """
    if not settings.sinks:
        return None
    from captioning.run_logs.records import RunLog

    about = {"captioner": folder.name, "fingerprint": name, "params": params, "sinks": settings.sinks}
    return RunLog(folder / name, {**about, "logging": settings.model_dump()}, settings)
