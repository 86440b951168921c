"""Where a training run's journal goes: DVCLive always, Weights & Biases and TensorBoard where params.yaml says so."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from captioning.curves import Curves
    from captioning.run_logs.records import RunLog
    from captioning.training import DecoderTask

FINISH_S = 60.0
"""For what is still on its way when the run is done; the rest stays in its folder."""
INTERRUPTED_S = 5.0
"""The same where somebody waits for this process to end."""


class TrainingLog:
    """The main process's; the others' (both None) takes everything and writes nothing."""

    def __init__(self, curves: Curves | None, run_log: RunLog | None = None) -> None:
        self.curves, self.run_log = curves, run_log

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """A new entry of the journal."""
        if self.curves is not None:
            self.curves.add(step, metrics)
        if self.run_log is not None:
            self.run_log.add(step, metrics)

    def again(self, step: int, metrics: dict[str, float]) -> None:
        """An entry that an earlier process made, and that a checkpoint brought."""
        if self.curves is not None:
            self.curves.add(step, metrics)
        if self.run_log is not None:
            self.run_log.again(step, metrics)

    def watch(self, task: DecoderTask) -> None:
        """Looks at a task's model and captions, too, where something besides DVCLive is on."""
        if self.run_log is not None:
            from captioning.run_logs.looks import Looks

            self.run_log.look = Looks(task, self.run_log.settings)

    def mend(self, lines: list[str]) -> None:
        """See `Curves.mend`: what DVC tracks must be whole. Raises CapstanError where it cannot be."""
        if self.curves is not None:
            self.curves.mend(lines)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.curves is not None:
            self.curves.close()
        if self.run_log is not None:
            self.run_log.close(FINISH_S if kind is None else INTERRUPTED_S)
