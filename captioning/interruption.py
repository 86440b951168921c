"""SIGTERM and SIGINT as a wish: finish the step, save, and end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """Somebody wants this process to end. Not an Exception, so that nothing takes it for a failure."""

    def __init__(self, number: int, note: str = "") -> None:
        super().__init__(number)
        self.number, self.note = number, note
        """The signal, and what was saved."""


class Interruption:
    """Within `with Interruption() as wish:` a signal sets `wish.signal`; what may be dropped raises Interrupted."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if self._at_once:
            self._at_once = False  # once: what cleans up now is left in peace
            raise Interrupted(number)

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None and self.signal is not None:
            raise Interrupted(self.signal)  # it came when there was nothing left to stop here, but there may be after

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Work within this changes nothing that is saved, so a signal ends it by raising Interrupted."""
        if self.signal is not None:
            raise Interrupted(self.signal)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False


def raise_on_signals() -> None:
    """For stages that keep whole parts: SIGTERM and SIGINT raise Interrupted, so that context managers clean up."""
    wish = Interruption()
    wish.__enter__()
    wish._at_once = True
