"""What `auto` and `range_test` in `train` and `decoder_settings` become: found once, before the first step, kept in the
run's work folder, and used again by a run that goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning import heuristics, storage
from captioning.distributed import World
from captioning.errors import CapstanError
from captioning.train_params import PlainTrainParams, TrainParams

if TYPE_CHECKING:
    from captioning.decoder_params import DecoderSettings
    from captioning.training_data import Data

FILE = "resolved.jsonl"
SEARCHED_AT_ONCE = 4
"""Batches: greedy search keeps nothing for a backward pass."""
Curve = list[tuple[float, float]]
"""Learning rates and losses of a range test."""


@dataclass(frozen=True)
class Resolved:
    """Numbers for all of a run's settings."""

    settings: PlainTrainParams
    learning_rate: float
    found: dict[str, Any]
    """What words became, and why; empty where there was none. `range_test`: its curve."""


def resolve(
    settings: TrainParams,
    decoder: DecoderSettings,
    num_images: int,
    images_that_fit: Callable[[PlainTrainParams], int],
    range_test: Callable[[PlainTrainParams], Curve],
    folder: Path,
    world: World,
) -> Resolved:
    """The main process finds them, or reads what it found before in `folder`; all processes get the same.

    Args:
        num_images: of the train split.
        images_that_fit: into one process's memory; asked only where `batch_size` is auto.
        range_test: asked only where `learning_rate` is range_test.

    Raises:
        CapstanError: a range test in which the loss never falls.
    """
    words = (settings.batch_size, settings.num_epochs, decoder.learning_rate)
    if not any(isinstance(word, str) for word in words):
        return _apply(settings, decoder, {})
    found = None
    if world.is_main:
        found = _recall(folder)
        said = "as found before" if found else ""
        if found is None:
            found = _find(settings, decoder, num_images, images_that_fit, range_test, world.num_processes)
            storage.write_part(folder / FILE, [found], folder.name)
        for name, reason in found["because"].items():
            print(f"{name} {found[name]} ({'; '.join(filter(None, [reason, said]))})", flush=True)
    return _apply(settings, decoder, world.share(found))


def _apply(settings: TrainParams, decoder: DecoderSettings, found: dict[str, Any]) -> Resolved:
    sizes = {name: found[name] for name in ("batch_size", "num_epochs") if name in found}
    plain = PlainTrainParams.model_validate(settings.model_dump() | sizes)
    return Resolved(plain, float(found.get("learning_rate", decoder.learning_rate)), found)


def _recall(folder: Path) -> dict[str, Any] | None:
    rows = storage.read_part(folder / FILE, folder.name)
    return rows[0] if rows else None


def _find(
    settings: TrainParams,
    decoder: DecoderSettings,
    num_images: int,
    images_that_fit: Callable[[PlainTrainParams], int],
    range_test: Callable[[PlainTrainParams], Curve],
    num_processes: int,
) -> dict[str, Any]:
    """Sizes first: a range test takes batches of the size that was found."""
    found: dict[str, Any] = {}
    because: dict[str, str] = {}
    given = {name: getattr(settings, name) for name in ("batch_size", "num_epochs")}
    numbers = {name: 1 if value == "auto" else value for name, value in given.items()}
    plain = PlainTrainParams.model_validate(settings.model_dump() | numbers)
    if settings.batch_size == "auto":
        most = images_that_fit(plain) * num_processes
        found["batch_size"] = heuristics.choose_batch_size(num_images, most)
        because["batch_size"] = f"auto: {num_images} train images, {most} at once fit into memory"
        plain = plain.model_copy(update=found)
    if settings.num_epochs == "auto":
        num_steps = -(-num_images // (plain.batch_size * plain.accumulate_steps))
        found["num_epochs"] = heuristics.choose_num_epochs(num_steps)
        because["num_epochs"] = f"auto: {num_steps} steps an epoch"
        plain = plain.model_copy(update=found)
    if isinstance(decoder.learning_rate, str):
        rate, because["learning_rate"] = _find_rate(decoder, plain, range_test)
        found |= rate
    return {**found, "because": because}


def _find_rate(
    decoder: DecoderSettings, settings: PlainTrainParams, range_test: Callable[[PlainTrainParams], Curve]
) -> tuple[dict[str, Any], str]:
    if decoder.learning_rate == "auto":
        optimizer, num_images = settings.optimizer.name, settings.batch_size * settings.accumulate_steps
        momentum = getattr(settings.optimizer, "momentum", 0.0)
        rate = heuristics.choose_rate(decoder.type, decoder.hidden_dim, optimizer, num_images, momentum)
        reason = f"auto: {decoder.type} of width {decoder.hidden_dim}, {optimizer}, {num_images} images a step"
        return {"learning_rate": rate}, reason
    print("learning rate range test: up to 120 steps", flush=True)
    curve = range_test(settings)
    try:
        rate = heuristics.choose_rate_by_test([rate for rate, _ in curve], [loss for _, loss in curve])
    except ValueError as error:
        raise CapstanError(f"learning_rate: range_test finds none: {error}. Give a number.") from None
    return {"learning_rate": rate, "range_test": curve}, f"range_test: {len(curve)} steps"


def set_sizes(data: Data, settings: PlainTrainParams) -> None:
    """Gives batches, validation and augmentation the sizes that were found."""
    train, val, cider = data
    train.size = val.size = settings.batch_size
    cider.size = SEARCHED_AT_ONCE * settings.batch_size
    augmenter = getattr(train.store, "augmenter", None)
    if augmenter is not None:
        augmenter.num_steps = settings.num_planned_epochs * len(train)
