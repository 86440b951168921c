"""Progress with rate and ETA: a bar on a terminal, a line every few seconds anywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_INTERVAL_S = 10.0


class Progress:
    """Counts work done. `with Progress("features", total=1000, unit="image") as progress: progress.update(32)`."""

    def __init__(
        self, description: str, total: int | None = None, unit: str = "item", initial: int = 0, shown: bool = True
    ) -> None:
        """`initial`: done by an earlier run. `shown`: False counts in silence, as processes besides the main one do."""
        self.description, self.total, self.unit = description, total, unit
        self.count = self.initial = initial
        self.started = self.last_line = time.monotonic()
        self.note = ""
        self.shown = shown
        self.bar = None
        if shown and sys.stderr.isatty():
            self.bar = tqdm(total=total, desc=description, unit=unit, initial=initial, dynamic_ncols=True)

    def update(self, num: int = 1, note: str = "") -> None:
        """Adds `num` units of work; `note` (a loss, say) is shown behind the rate."""
        self.count += num
        self.note = note or self.note
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(num)
        elif self.shown and time.monotonic() - self.last_line >= LINE_INTERVAL_S:
            self._print_line()

    def write(self, line: str) -> None:
        """Prints a line without tearing the bar."""
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def _print_line(self) -> None:
        self.last_line = time.monotonic()
        seconds = max(self.last_line - self.started, 1e-9)
        rate = (self.count - self.initial) / seconds
        of_total, eta = "", ""
        if self.total:
            of_total = f"/{self.total} ({100 * self.count / self.total:.0f} %)"
            left = (self.total - self.count) / rate if rate else 0
            eta = f", {left:.0f} s left" if left > 0 else f", {seconds:.1f} s"
        note = f", {self.note}" if self.note else ""
        print(f"{self.description}: {self.count}{of_total} {self.unit}s, {rate:.1f}/s{eta}{note}", flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.shown and kind is None:
            self._print_line()
