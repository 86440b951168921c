from __future__ import annotations

import math
import os
import random
import signal

import numpy as np
import pytest
import torch
from test_checkpoints import settings as recovery
from test_datasets import annotation, write_shard

from captioning import training
from captioning.checkpoints import Checkpointer
from captioning.datasets import CaptionBatches, FeatureStore
from captioning.decoders import DecoderConfig, build_decoder
from captioning.distributed import ALONE
from captioning.errors import CapstanError
from captioning.evaluation import GreedyCider, foresee
from captioning.interruption import Interrupted
from captioning.loop import Journal, Loop
from captioning.optimization import seed_step
from captioning.train_params import PlainTrainParams
from captioning.vocabulary import Vocabulary

WORDS = "red blue green circle square".split()


def settings(**changes) -> PlainTrainParams:
    values = dict(
        num_processes=1, encoder_mode="cached", augmentation=None, gradient_checkpointing=False, compile=False,
        num_epochs=25, batch_size=4, accumulate_steps=1,
        optimizer={"name": "adamw", "betas": (0.9, 0.999), "weight_decay": 0.01},
        scheduler={"name": "cosine", "warmup_steps": 5, "min_factor": 0.0}, label_smoothing=0.0, eos_suppression=None,
        scheduled_sampling=None, self_critical=None, clip_norm=5.0, clip_value=None, ema_decay=None, select_by="CIDEr",
        early_stopping=None, log_every_steps=10, max_skipped_steps=2, precision="fp32", seed=1, deterministic=True,
    )  # fmt: skip
    return PlainTrainParams(**(values | changes))


def build(folder, world=ALONE, log=lambda *entry: None, dropout=0.1, **changes):
    """A task that can be learnt by heart: each image's features decide its caption of two words. Images: 11."""
    write_shard(folder, "00000", 11)
    vocabulary = Vocabulary.build([" ".join(WORDS)], 1, 4)
    images = [
        annotation(i, "00000").model_copy(update={"captions": [f"{WORDS[i % 3]} {WORDS[3 + i % 2]}"]})
        for i in range(11)
    ]
    store = FeatureStore(folder, images)
    batches = CaptionBatches(store, images, vocabulary, 4)
    cider = GreedyCider(store, [a.captions for a in images], vocabulary, 8)
    values = settings(**changes)
    training.seed_everything(values.seed, values.deterministic)
    decoder = build_decoder(
        DecoderConfig(
            type="lstm",
            attention="bahdanau",
            context_gate=True,
            vocabulary_size=len(vocabulary),
            encoder_dim=6,
            embedding_dim=16,
            hidden_dim=32,
            attention_dim=16,
            region_dim=16,
            dropout=dropout,
        )
    )
    journal = Journal(log)
    task = training.DecoderTask(decoder, batches, batches, cider, values, 0.02, journal, world)
    return task, journal


def run(task, journal, keeper=None, world=ALONE) -> Loop:
    loop = Loop(task, journal, task.settings.max_skipped_steps, keeper, world)
    loop.run()
    return loop


def test_it_learns_and_keeps_the_best(tmp_path) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    task, journal = build(tmp_path, log=lambda *entry: logged.append(entry))
    before = foresee(task.decoder, task.val, task.device).loss
    loop = run(task, journal)
    ciders = [record["val_CIDEr"] for record in task.history]
    assert task.history[-1]["val_loss"] < before / 4
    assert task.best.cider == max(ciders) > 3 and task.best.epoch == ciders.index(max(ciders))
    task.decoder.load_state_dict(task.best.state)
    assert task.val_cider(task.decoder, task.device) == task.best.cider
    assert loop.position.step == loop.num_steps == 75
    assert [step for step, values in logged if "train/loss" in values] == list(range(10, 76, 10))


def test_the_same_seed_gives_the_same_weights(tmp_path) -> None:
    tasks = [build(tmp_path, num_epochs=2, seed=seed) for seed in (1, 1, 2)]
    first, second, third = (run(*task).task.best.state for task in tasks)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not all(torch.equal(first[n], third[n]) for n in first)


class Stop(Exception):
    """A kill, as far as anything that is not on disk is concerned."""


@pytest.mark.parametrize("stops", [[1], [3], [5], [2, 3, 4], [6, 6, 9], [8, 12], [12], [11, 12]])
@pytest.mark.parametrize("kill", [True, False])
def test_a_run_stopped_anywhere_ends_with_the_same_bits(tmp_path, monkeypatch, stops: list[int], kill: bool) -> None:
    """Mid-epoch, at the last batch, at an epoch's boundary, in validation; by a kill or by SIGTERM; once or often."""
    wanted_log: list[object] = []
    wanted, journal = build(tmp_path, log=lambda *entry: wanted_log.append(entry), num_epochs=4, log_every_steps=1)
    run(wanted, journal)
    for stop in [*stops, None]:
        logged: list[object] = []
        task, journal = build(tmp_path, log=lambda *e, to=logged: to.append(e), num_epochs=4, log_every_steps=1)
        lock = os.open(os.devnull, os.O_RDWR)
        keeper = Checkpointer(tmp_path / "checkpoints", "print", recovery(checkpoint_steps=2), lock)
        stop_at(task, stop, kill, monkeypatch)
        if stop is None:
            loop = run(task, journal, keeper)
        else:
            with pytest.raises(Stop if kill else Interrupted):
                run(task, journal, keeper)
        os.close(lock)
    assert loop.position.step == 12
    assert all(torch.equal(value, task.best.state[name]) for name, value in wanted.best.state.items())
    assert all(
        torch.equal(value, task.decoder.state_dict()[name]) for name, value in wanted.decoder.state_dict().items()
    )
    assert task.history == wanted.history and logged == wanted_log


def stop_at(task, stop: int | None, kill: bool, monkeypatch) -> None:
    """Before step `stop` is made (counted from 1); where an epoch ends there, in its validation."""
    real_step, real_evaluate = task.train_step, task.evaluate

    def fall() -> None:
        if kill:
            raise Stop
        signal.raise_signal(signal.SIGTERM)

    def train_step(share, step, wish):
        if step + 1 == stop and stop % task.steps_per_epoch:
            fall()
        return real_step(share, step, wish)

    def evaluate():
        if (len(task.history) + 1) * task.steps_per_epoch == stop:
            fall()
        return real_evaluate()

    monkeypatch.setattr(task, "train_step", train_step)
    monkeypatch.setattr(task, "evaluate", evaluate)


def test_sigterm_saves_just_where_it_is(tmp_path, monkeypatch, capsys) -> None:
    task, journal = build(tmp_path, num_epochs=4)
    keeper = Checkpointer(tmp_path / "c", "print", recovery(checkpoint_steps=1000), os.open(os.devnull, os.O_RDWR))
    stop_at(task, 5, False, monkeypatch)
    with pytest.raises(Interrupted) as caught:
        run(task, journal, keeper)
    assert caught.value.note == "saved at step 5" and caught.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert (tmp_path / "c" / "step-00000005").is_dir()


def test_a_signal_in_the_very_last_moment_is_not_forgotten(tmp_path, monkeypatch) -> None:
    task, journal = build(tmp_path, num_epochs=1)
    real = task.end_epoch

    def end_epoch(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(task, "end_epoch", end_epoch)
    with pytest.raises(Interrupted):
        run(task, journal)
    assert len(task.history) == 1


def poison(task, steps: set[int], monkeypatch) -> None:
    """Makes the loss of these steps not finite."""
    real, now = task._losses, [0]

    def train_step(share, step, stop, inner=task.train_step):
        now[0] = step
        return inner(share, step, stop)

    monkeypatch.setattr(task, "train_step", train_step)
    monkeypatch.setattr(
        task, "_losses", lambda share: (x * (math.nan if now[0] in steps else 1.0) for x in real(share))
    )


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, monkeypatch, capsys) -> None:
    task, journal = build(tmp_path, num_epochs=2)
    poison(task, {1, 3}, monkeypatch)
    before = []
    real = task.stepper.update

    def step(*arguments):
        weights = [p.clone() for p in task.stepper.parameters]
        value, finite, stop = real(*arguments)
        before.append((finite, all(torch.equal(a, b) for a, b in zip(weights, task.stepper.parameters, strict=True))))
        return value, finite, stop

    monkeypatch.setattr(task.stepper, "update", step)
    loop = run(task, journal)
    assert [finite for finite, _ in before] == [True, False, True, False, True, True]
    assert all(finite != unchanged for finite, unchanged in before)
    assert loop.position.num_skipped == 2 and all(math.isfinite(r["train_loss"]) for r in task.history)
    assert capsys.readouterr().err.count("WARNING: step") == 2


def test_too_many_in_a_row_stop_the_run_and_keep_the_last_good_checkpoint(tmp_path, monkeypatch) -> None:
    task, journal = build(tmp_path, num_epochs=4)
    poison(task, {4, 5, 6}, monkeypatch)
    keeper = Checkpointer(tmp_path / "c", "print", recovery(checkpoint_steps=1), os.open(os.devnull, os.O_RDWR))
    real = keeper.save
    monkeypatch.setattr(keeper, "save", lambda *a: real(*a[:4], wait=True))
    with pytest.raises(CapstanError, match=r"3 steps in a row .* Lower the learning rate"):
        run(task, journal, keeper)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-00000003", "step-00000004"]


def test_weight_decay_leaves_biases_and_embeddings_alone(tmp_path) -> None:
    task, _ = build(tmp_path)
    decayed, plain = task.stepper.optimizer.param_groups
    assert all(p.ndim > 1 for p in decayed["params"]) and plain["weight_decay"] == 0
    assert any(p is task.decoder.embedding.weight for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(task.decoder.parameters()))


def test_randomness_of_a_step_is_a_pure_function(tmp_path) -> None:
    def draw(*place: int) -> tuple[float, float, float]:
        seed_step(*place)
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    places = [(1, 0, 0), (1, 1, 0), (2, 0, 0), (1, 0, 1)]
    found = [draw(*place) for place in places]
    assert found == [draw(*place) for place in places] and len(set(found)) == 4
