"""A training run's curves, as DVCLive keeps them: `dvc plots` and the report read them."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from captioning import monitoring, storage
from captioning.errors import CapstanError


class Curves:
    """DVCLive in `live_dir`; it never touches dvc.yaml.

    What cannot be written (a full disk) must not end the run: it is all in the journal, and `mend` writes it again.
    """

    def __init__(self, live_dir: Path) -> None:
        self.live_dir = live_dir
        self.live: Any = None
        self.torn = not self._begin()

    def _begin(self) -> bool:
        from dvclive import Live

        os.environ.setdefault("DVCLIVE_LOGLEVEL", "ERROR")
        try:
            storage.remove(self.live_dir)  # a resumed run logs all again, from its checkpoint
            self.live = Live(dir=str(self.live_dir), dvcyaml=None, report=None, save_dvc_exp=False)
        except OSError:
            return False
        return True

    def add(self, step: int, metrics: dict[str, float]) -> None:
        if self.live is None:
            return
        try:
            self.live.step = step
            for name, value in metrics.items():
                self.live.log_metric(name, value)
            self.live.make_summary()
        except OSError as error:
            self.torn = True
            monitoring.alert("curves", f"training curves are not written ({error.strerror}); they are when it ends")

    def mend(self, lines: list[str]) -> None:
        """Writes everything again from the journal, where something could not be written."""
        if not self.torn:
            return
        self.torn = not self._begin()
        for entry in map(json.loads, lines):
            self.add(entry["step"], entry["metrics"])
        if self.torn:
            raise CapstanError(
                f"{self.live_dir} cannot be written. Make room and run `dvc repro` again; nothing is lost."
            )

    def close(self) -> None:
        if self.live is not None:
            with suppress(OSError):
                self.live.end()
