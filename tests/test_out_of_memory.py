"""A step that does not fit into memory is done again in halves: the same step, and the same bits after any kill."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_distributed import environment
from test_memory import cpu_error, gpu_error
from test_training import Stop, build, run, stop_at
from test_training_options import assert_same, keeper_in

from captioning.datasets import part_of, pieces
from captioning.errors import CapstanError
from captioning.interruption import Interrupted

WORKS = ("train", "loss", "search")


def limit_training(task, most: int, steps: range | None = None, error=gpu_error) -> list[int]:
    """Lets no more than `most` images at once pass the loss (in these steps). Returns what passed, as it grows."""
    real, step, passed = task._losses, task.train_step, []
    now = [0]

    def train_step(shares, number, stop):
        now[0] = number
        return step(shares, number, stop)

    def losses(share):
        torch.rand(3)  # a failed try has drawn something
        if len(share.batch.features) > most and (steps is None or now[0] in steps):
            raise error()
        passed.append(len(share.batch.features))
        return real(share)

    task.train_step, task._losses = train_step, losses
    return passed


@pytest.mark.parametrize("error", [gpu_error, cpu_error])
def test_the_step_in_halves_is_the_same_step(tmp_path, capsys, error) -> None:
    """Without dropout the losses and weights agree with those of a run with memory enough, to rounding."""
    options = dict(dropout=0.0, num_epochs=3, log_every_steps=1, accumulate_steps=2)
    wanted, journal = build(tmp_path, **options)
    run(wanted, journal)
    task, journal_of_halves = build(tmp_path, **options)
    passed = limit_training(task, 2, range(1, 99), error)
    run(task, journal_of_halves)
    assert passed == [4, 4, *[1] * 25] and task.fittings["train"].num_images == 1  # a batch of 3 did not fit
    found, sought = ([json.loads(line)["metrics"] for line in j.lines] for j in (journal_of_halves, journal))
    for mine, theirs in zip(found, sought, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    for name, value in wanted.decoder.state_dict().items():
        assert torch.allclose(value, task.decoder.state_dict()[name], atol=2e-4), name
    said = capsys.readouterr()
    assert "out of memory with 3 images at once: 1 from here on" in said.out
    assert said.err.count("WARNING: out of memory in training: from here on at most 1 images at once") == 1


def test_a_batch_in_parts_has_every_image_once(tmp_path) -> None:
    task, _ = build(tmp_path, accumulate_steps=3)
    for number, captions in enumerate(task.train.captions):
        task.train.captions[number] = [captions[0] * (1 + number % 3), captions[0][:1]][: 1 + number % 2]
    (shares,) = task.batches(0, 0)
    assert part_of(shares[0].batch, slice(0, 4)) is shares[0].batch
    for share in shares:
        parts = pieces(share, [slice(0, 3), slice(3, 4)])
        assert len(parts) == (2 if len(share.batch.features) == 4 else 1)
        assert torch.cat([part.batch.features for part in parts]).equal(share.batch.features)
        assert {part.num_tokens for part in parts} == {share.num_tokens}
        assert sum(part.batch.num_tokens for part in parts) == share.batch.num_tokens
        for part, start in zip(parts, (0, 3), strict=False):
            images, width, steps = part.batch.targets.shape
            assert part.batch.targets.equal(share.batch.targets[start : start + images, :width, :steps])
            assert part.batch.targets[:, -1].any() and part.batch.targets[..., -1].any()  # no wider, no longer
            assert part.batch.targets.view(-1)[part.batch.places].equal(part.batch.packed_targets)
            assert not share.batch.targets[start : start + images, width:].any()
            assert not share.batch.targets[start : start + images, :, steps:].any()


def limit_validation(task, loss: int, search: int) -> None:
    """Lets no more than so many images at once pass validation."""
    decoder = task.decoder
    forward, remember = decoder.forward, decoder.remember

    def guarded_forward(batch):
        if not decoder.training and len(batch.features) > loss:
            raise gpu_error()
        return forward(batch)

    def guarded_remember(features):
        if not decoder.training and not torch.is_grad_enabled() and len(features) > search:
            raise gpu_error()
        return remember(features)

    decoder.forward, decoder.remember = guarded_forward, guarded_remember


@pytest.mark.parametrize("stops", [[2], [3], [4, 5], [6], [8]])
@pytest.mark.parametrize("kill", [True, False])
def test_a_stopped_run_ends_with_the_same_bits(tmp_path, monkeypatch, stops, kill) -> None:
    """Memory gets short in step 4 of 9, counted from 0, with dropout; it stays so, as a batch too large does. Each
    validation is short of it, too."""

    def start():
        task, journal = build(tmp_path, dropout=0.3, num_epochs=3, log_every_steps=1)
        passed = limit_training(task, 3, range(4, 99))
        limit_validation(task, 3, 5)
        return task, journal, passed

    wanted, wanted_journal, passed = start()
    run(wanted, wanted_journal)
    assert max(passed[4:]) == 2 and {w: f.num_images for w, f in wanted.fittings.items()} == dict(
        zip(WORKS, (2, 2, 4), strict=True)
    )
    for stop in [*stops, None]:
        task, journal, _ = start()
        stop_at(task, stop, kill, monkeypatch)
        if stop is None:
            run(task, journal, keeper_in(tmp_path))
        else:
            with pytest.raises(Stop if kill else Interrupted):
                run(task, journal, keeper_in(tmp_path))
    assert_same(task.state_dict(), wanted.state_dict())
    assert journal.lines == wanted_journal.lines


def test_a_shortage_that_passes_is_remembered_by_the_checkpoint(tmp_path, monkeypatch) -> None:
    """Another process took the memory in step 2 alone: who goes on from step 5 goes on in halves, to the same bits."""
    options = dict(dropout=0.3, num_epochs=3, log_every_steps=1)
    wanted, wanted_journal = build(tmp_path, **options)
    limit_training(wanted, 2, range(2, 3))
    run(wanted, wanted_journal)
    task, journal = build(tmp_path, **options)
    limit_training(task, 2, range(2, 3))
    stop_at(task, 5, False, monkeypatch)  # saves there
    with pytest.raises(Interrupted):
        run(task, journal, keeper_in(tmp_path))
    assert task.fittings["train"].num_images == 1
    task, journal = build(tmp_path, **options)
    passed = limit_training(task, 2, range(2, 3))
    run(task, journal, keeper_in(tmp_path))
    assert set(passed) == {1}
    assert_same(task.state_dict(), wanted.state_dict())


def test_memory_that_is_short_at_the_first_step_after_a_resume(tmp_path, monkeypatch) -> None:
    """The step is the same but for rounding (no dropout), and so is the run."""
    options = dict(dropout=0.0, num_epochs=3, log_every_steps=1)
    wanted, wanted_journal = build(tmp_path, **options)
    run(wanted, wanted_journal)
    task, journal = build(tmp_path, **options)
    stop_at(task, 5, True, monkeypatch)
    with pytest.raises(Stop):
        run(task, journal, keeper_in(tmp_path))
    task, journal = build(tmp_path, **options)
    passed = limit_training(task, 3)
    run(task, journal, keeper_in(tmp_path))
    assert 1 <= len(passed) and max(passed) <= 3
    losses = [record["train_loss"] for record in task.history]
    assert losses == pytest.approx([record["train_loss"] for record in wanted.history], rel=1e-4)


CRITICAL = {"start_epoch": 2, "num_samples": 3, "rate_factor": 0.5, "cross_entropy_weight": 0.5}


def test_a_self_critical_step_in_halves_keeps_nothing_of_its_first_try(tmp_path) -> None:
    """Neither captions drawn in vain nor their rewards: the bits of a run that knew from the start of that step."""
    options = dict(dropout=0.3, num_epochs=3, log_every_steps=1, self_critical=CRITICAL)
    wanted, wanted_journal = build(tmp_path, **options)
    limit_training(wanted, 99)
    step = wanted.train_step

    def train_step(shares, number, stop):
        if number == 4:
            wanted.fittings["train"].num_images = 2
        return step(shares, number, stop)

    wanted.train_step = train_step
    run(wanted, wanted_journal)
    task, journal = build(tmp_path, **options)
    real, failed = task.critic.loss_sum, []

    def loss_sum(decoder, batch, rewards):
        found = real(decoder, batch, rewards)  # draws and counts rewards
        if len(batch.features) > 3:
            failed.append(rewards.number)
            raise gpu_error()
        return found

    limit_training(task, 99)
    now = task.train_step

    def from_step_4(shares, number, stop):
        task.critic.loss_sum = loss_sum if number >= 4 else real
        return now(shares, number, stop)

    task.train_step = from_step_4
    run(task, journal)
    assert failed == [12]
    assert_same(task.state_dict(), wanted.state_dict())
    assert journal.lines == wanted_journal.lines


def test_an_image_that_does_not_fit_alone_ends_the_run(tmp_path) -> None:
    task, journal = build(tmp_path, num_epochs=1)
    limit_training(task, 0)
    with pytest.raises(CapstanError, match="out of memory with a single image"):
        run(task, journal)


def test_other_errors_are_not_taken_for_it(tmp_path) -> None:
    task, journal = build(tmp_path, num_epochs=1)
    limit_training(task, 0, error=lambda: RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(task, journal)


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
from captioning.distributed import join_world
from test_out_of_memory import limit_training
from test_training import build, run
with join_world() as world:
    own = Path({folder!r}) / str(world.rank)
    own.mkdir()
    task, journal = build(own, world, dropout=0.0, num_epochs=2, log_every_steps=1)
    passed = limit_training(task, 1, range(1, 2)) if world.rank == 1 else limit_training(task, 99)
    run(task, journal, None, world)
    losses = [record["train_loss"] for record in task.history]
    (own / "found").write_text(repr((losses, task.fittings["train"].num_images, passed)))
"""


def test_one_rank_that_is_short_of_memory_stops_no_other(tmp_path) -> None:
    """Both go on in halves from the next step on, and the losses are those of a run with memory enough."""
    (tmp_path / "alone").mkdir()
    alone, journal = build(tmp_path / "alone", dropout=0.0, num_epochs=2, log_every_steps=1)
    run(alone, journal)
    here = Path(__file__).parent
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT.format(tests=str(here), root=str(here.parent), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("WARNING: out of memory in training") == 1
    found = [ast.literal_eval((tmp_path / str(rank) / "found").read_text()) for rank in range(2)]
    assert found[0][0] == found[1][0] == pytest.approx([r["train_loss"] for r in alone.history], rel=1e-4)
    assert [numbers for _, numbers, _ in found] == [1, 1]
    assert found[0][2][:2] == [2, 2] and set(found[0][2][2:]) == {1}
