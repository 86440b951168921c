"""A training run that can be stopped anywhere: epochs and steps, checkpoints, interruption, steps that are left out.

What is trained is a `Task`. Where the run is, is a `Position`; it goes into every checkpoint with the task's state, and
together they decide all that follows, so a resumed run ends with the bits of one that was never stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from captioning import monitoring
from captioning.checkpoints import Checkpointer
from captioning.distributed import ALONE, World
from captioning.errors import CapstanError
from captioning.interruption import Interrupted, Interruption
from captioning.progress import Progress


@dataclass(frozen=True)
class Outcome:
    """Of one step, the same on every rank."""

    loss: float
    """Mean over `weight` units."""
    weight: int
    """Units of the loss (tokens, batches), by which steps are averaged over an epoch."""
    finite: bool
    """False: loss or gradient was not, and the step changed nothing."""
    stop: bool
    """Some rank was asked to end."""


class Task(Protocol):
    """What is trained. Its state after a step is all that the next step depends on."""

    name: str
    num_epochs: int
    """Of the whole run. A task that has seen enough lowers it to the epochs that are done, in `end_epoch`, and again in
    `load_state_dict`: its state decides where a run ends."""
    steps_per_epoch: int

    def batches(self, epoch: int, first: int) -> Iterator[Any]:
        """What the epoch's steps take, from number `first` on; their order is a pure function of the epoch."""
        ...

    def train_step(self, batch: Any, step: int, stop: bool) -> Outcome:
        """One optimizer step, number `step` of the run from 0; `stop`: this rank was asked to end."""
        ...

    def evaluate(self) -> Any:
        """Validates and changes nothing, so that it may be interrupted."""
        ...

    def end_epoch(self, epoch: int, step: int, mean_loss: float, found: Any) -> str:
        """Takes up what `evaluate` found, and returns a line for the console."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Position:
    """Where a run is: the samples that the optimizer has consumed, not those that a loader has fetched."""

    epoch: int = 0
    batch: int = 0
    """What steps of this epoch have consumed; one item of `Task.batches` a step."""
    step: int = 0
    loss_sum: float = 0.0
    """Of this epoch: loss times weight."""
    weight: int = 0
    num_skipped: int = 0
    skipped_in_row: int = 0


class Journal:
    """What a run logs, as JSON lines; it goes into each checkpoint, so a resumed run has all of it, nothing twice."""

    def __init__(self, log: Any, log_again: Any = None) -> None:
        """`log(step, metrics)` receives each entry; `log_again` those of an earlier process (None: `log` does)."""
        self.log, self.log_again, self.lines = log, log_again or log, list[str]()

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        self._keep(step, metrics)
        self.log(step, metrics)

    def replay(self, entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            self._keep(entry["step"], entry["metrics"])
            self.log_again(entry["step"], entry["metrics"])

    def _keep(self, step: int, metrics: dict[str, float]) -> None:
        self.lines.append(json.dumps({"step": step, "metrics": metrics}))


class Loop:
    """Runs a task to its end, from the newest good checkpoint if there is one."""

    def __init__(
        self,
        task: Task,
        journal: Journal,
        max_skipped_steps: int,
        keeper: Checkpointer | None = None,
        world: World = ALONE,
    ) -> None:
        """`keeper`: the main process's; None keeps no checkpoints."""
        self.task, self.journal, self.keeper, self.world = task, journal, keeper, world
        self.max_skipped_steps = max_skipped_steps
        self.position = Position()

    @property
    def num_steps(self) -> int:
        return self.task.num_epochs * self.task.steps_per_epoch

    def run(self) -> None:
        """All that is left of the run.

        Raises:
            Interrupted: on SIGTERM or SIGINT, after the state was saved.
            CapstanError: `max_skipped_steps` steps in a row were not finite; the last good checkpoint is kept.
        """
        self._resume()
        try:
            with (
                Interruption() as wish,
                Progress(self.task.name, self.num_steps, "step", self.position.step, self.world.is_main) as progress,
            ):
                while self.position.epoch < self.task.num_epochs:
                    self._train_epoch(wish, progress)
                    self._end_epoch(wish, progress)
        finally:
            if self.keeper:
                self.keeper.close()

    def _resume(self) -> None:
        found = self.keeper.load() if self.keeper else None
        saved = {"state": found.state, "journal": found.journal} if found else None
        if self.world.num_processes > 1:
            saved = share(saved, self.world)
        if saved is not None:
            self.position = Position(**saved["state"]["position"])
            self.task.load_state_dict(saved["state"]["task"])
            self.journal.replay(saved["journal"])

    def _train_epoch(self, wish: Interruption, progress: Progress) -> None:
        at = self.position
        batches = self.task.batches(at.epoch, at.batch)
        while True:
            with monitoring.waiting():
                batch = next(batches, None)
            if batch is None:
                return
            outcome = self.task.train_step(batch, at.step, wish.signal is not None)
            self._count(outcome)
            progress.update(note=f"epoch {at.epoch + 1}/{self.task.num_epochs}, loss {outcome.loss:.3f}")
            if outcome.stop or (self.world.num_processes == 1 and wish.signal is not None):
                self._save_and_end(wish)
            # A state that cannot go on must not push out the last good one.
            if self.keeper and not at.skipped_in_row and self.keeper.is_due(at.step):
                self._save()

    def _count(self, outcome: Outcome) -> None:
        at = self.position
        at.batch, at.step = at.batch + 1, at.step + 1
        if outcome.finite:
            at.loss_sum += outcome.loss * outcome.weight
            at.weight += outcome.weight
            at.skipped_in_row = 0
            monitoring.clear("loss_not_finite")
        else:
            at.num_skipped, at.skipped_in_row = at.num_skipped + 1, at.skipped_in_row + 1
            if self.world.is_main:
                monitoring.alert("loss_not_finite", f"step {at.step} was skipped: its loss or gradient is not finite")
        if at.skipped_in_row > self.max_skipped_steps:
            raise CapstanError(
                f"{at.skipped_in_row} steps in a row had a loss or gradient that is not finite (step {at.step}, loss "
                f"{outcome.loss}). Lower the learning rate or the clip norm; the last good checkpoint is kept."
            )

    def _end_epoch(self, wish: Interruption, progress: Progress) -> None:
        at = self.position
        try:
            with wish.at_once():
                found = self.task.evaluate()
        except Interrupted:
            self._save_and_end(wish)
        line = self.task.end_epoch(at.epoch, at.step, at.loss_sum / max(at.weight, 1), found)
        if self.world.is_main:
            progress.write(f"epoch {at.epoch + 1}/{self.task.num_epochs}: {line}")
        at.epoch, at.batch, at.loss_sum, at.weight = at.epoch + 1, 0, 0.0, 0
        if self.keeper and not at.skipped_in_row:
            self.keeper.ask()
            if at.epoch == self.task.num_epochs:
                self._save(wait=True)  # so that a run killed between here and dvc.lock has nothing to train
            elif self.keeper.is_due(at.step):
                self._save()

    def _save(self, wait: bool = False) -> bool:
        assert self.keeper is not None
        state = {"position": asdict(self.position), "task": self.task.state_dict()}
        return self.keeper.save(self.position.step, self.position.epoch, state, self.journal.lines, wait)

    def _save_and_end(self, wish: Interruption) -> None:
        note = ""
        if self.keeper and not self.position.skipped_in_row:
            saved = self._save(wait=True)
            note = f"saved at step {self.position.step}" if saved else "the earlier checkpoints are kept"
        raise Interrupted(wish.signal or 15, note)


def share(saved: dict[str, Any] | None, world: World) -> dict[str, Any] | None:
    """The main process's tree (tensors and plain values), on every rank."""
    from safetensors.torch import save

    from captioning.tensor_files import join_tree, parse_tensors, split_tree

    plain, tensors = split_tree(saved) if saved is not None else (None, {})
    content = world.broadcast(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    found: dict[str, Any] | None = join_tree(world.share(plain), parse_tensors(content))
    return found
