"""A run of Weights & Biases, in `<folder>/wandb`.

Its id is the run's fingerprint. An entry's place in the journal is wandb's own step, so where an online run is resumed,
what the server has already is told apart from what it lacks.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from captioning import storage
from captioning.run_logs.records import Record

FOLDER = "wandb"
MAX_ID = 64
INIT_S = 30
"""For the server to answer."""


class WandbSink:
    """An online run that cannot begin is kept offline."""

    def __init__(self, folder: Path, about: Record, say: Callable[[str | None], None]) -> None:
        storage.remove(folder / FOLDER)  # all of it is written again, or with the server
        mode = about["logging"]["wandb"]
        try:
            self.run = _start(folder, about, mode)
        except Exception as error:
            if mode == "offline":
                raise
            reason = " ".join(str(error).split())[:300]
            say(f"logging.wandb: {reason}; it is kept offline: `wandb sync {folder / FOLDER}/offline-run-*` sends it")
            _forget_attempt()
            self.run = _start(folder, about, "offline")
        self._first = self.run.step
        """What the server has of an earlier process."""
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, index: int, record: Record) -> None:
        if index >= self._first:
            self.run.log(as_row(record), step=index)

    def close(self) -> None:
        self.run.finish()


def _forget_attempt() -> None:
    """Else wandb's service says that the run's id is in use."""
    import wandb

    wandb.teardown()


def _start(folder: Path, about: Record, mode: Literal["offline", "online"]) -> Any:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # who asks for offline wants nothing to be sent
    os.environ.setdefault("WANDB_INIT_TIMEOUT", str(INIT_S))
    import wandb

    return wandb.init(
        project=about["logging"]["wandb_project"],
        id=f"{about['captioner']}-{about['fingerprint']}"[-MAX_ID:],
        name=about["captioner"],
        config=about["params"],
        dir=str(folder),
        mode=mode,
        resume="allow" if mode == "online" else None,
        # Its own measurements would be of this process, not of the trainer.
        settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
    )


def as_row(record: Record) -> Record:
    """What `wandb.log` takes."""
    import numpy as np
    import wandb

    row = {**record["metrics"], "step": record["step"]}
    row |= {f"machine/{name}": value for name, value in record.get("machine", {}).items()}
    for name, counted in record.get("histograms", {}).items():
        edges = np.linspace(counted["low"], counted["high"], len(counted["counts"]) + 1)
        row[f"parameters/{name}"] = wandb.Histogram(np_histogram=(np.array(counted["counts"]), edges))
    if "captions" in record:
        row["val/captions"] = wandb.Html(as_html(record["captions"]), inject=False)
    return row


def as_html(captions: list[Record]) -> str:
    """A table, a row an image. (wandb's own tables are artifacts, which it keeps in the user's home.)"""
    cells = [(c["image_id"], c["caption"], "; ".join(c["references"])) for c in captions]
    rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in cells]
    return (
        "<table><tr><th>image<th>caption<th>references</tr>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"
    )
