"""What `train` can be told besides the plain run of tests/test_training.py: each does what it claims, and resumes."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch
from test_checkpoints import settings as recovery
from test_training import Stop, build, run, stop_at

from captioning.averaging import Average
from captioning.checkpoints import Checkpointer
from captioning.datasets import collate
from captioning.evaluation import Tally, foresee
from captioning.interruption import Interrupted
from captioning.penalties import doubly_stochastic, early_end
from captioning.scheduled_sampling import NEVER_READ, mix_in_own_words
from captioning.selection import Best, is_enough, score_of
from captioning.train_params import EarlyStopping
from captioning.vocabulary import Vocabulary

EOS, PAD = Vocabulary.eos_id, Vocabulary.pad_id

EVERYTHING = dict(
    accumulate_steps=2,
    optimizer={"name": "nadam", "betas": (0.9, 0.99), "weight_decay": 0.01},
    scheduler={"name": "plateau", "warmup_steps": 2, "min_factor": 0.1, "factor": 0.5, "patience": 0, "min_delta": 0.3},
    eos_suppression={"min_length": 2, "weight": 0.5},
    scheduled_sampling={"start_epoch": 2, "every_epochs": 1, "increase": 0.3, "maximum": 0.8},
    clip_value=0.01,
    ema_decay=0.9,
    select_by="loss",
    early_stopping={"patience": 2, "min_delta": 0.2},
    log_every_steps=1,
    num_epochs=9,
)  # fmt: skip


def keeper_in(folder) -> Checkpointer:
    return Checkpointer(folder / "checkpoints", "print", recovery(checkpoint_steps=1), os.open(os.devnull, os.O_RDWR))


def logger():
    logged: list[tuple[int, dict[str, float]]] = []
    return logged, lambda *entry: logged.append(entry)


@pytest.mark.parametrize("stops", [[1], [3], [5, 6], [8, 9]])
@pytest.mark.parametrize("kill", [True, False])
def test_with_everything_on_a_stopped_run_ends_with_the_same_bits(tmp_path, monkeypatch, stops, kill) -> None:
    """An epoch has 2 steps: of 2 batches, and of 1. In mid-epoch, in validation, and after early stopping."""
    wanted_log, log = logger()
    wanted, journal = build(tmp_path, log=log, **EVERYTHING)
    run(wanted, journal)
    assert 4 < len(wanted.history) < 9 and wanted.own_words > 0  # it stopped early
    for stop in [*stops, None, None]:  # the last one finds all done
        logged, log = logger()
        task, journal = build(tmp_path, log=log, **EVERYTHING)
        stop_at(task, stop, kill, monkeypatch)
        if stop is None:
            loop = run(task, journal, keeper_in(tmp_path))
        else:
            with pytest.raises(Stop if kill else Interrupted):
                run(task, journal, keeper_in(tmp_path))
    assert loop.position.step == 2 * len(wanted.history) and loop.position.epoch == len(wanted.history)
    for mine, theirs in ((task.best.state, wanted.best.state), (task.state_dict(), wanted.state_dict())):
        assert_same(mine, theirs)
    assert task.history == wanted.history and logged == wanted_log


def assert_same(first, second) -> None:
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for pair in zip(first, second, strict=True):
            assert_same(*pair)
    else:
        assert first == second


def test_accumulated_batches_are_one_large_batch(tmp_path) -> None:
    """Batches of 4, 4 and 3 images in one step, against a batch of 11: the same mean a token, the same weights."""
    found = {}
    for name, size, steps in (("large", 11, 1), ("pieces", 4, 3)):
        task, journal = build(tmp_path, dropout=0.0, num_epochs=3, accumulate_steps=steps, batch_size=size)
        task.train.size = size
        task.steps_per_epoch = 1
        loop = run(task, journal)
        assert loop.position.step == 3
        found[name] = task.history, torch.cat([p.flatten() for p in task.decoder.parameters()])
    for pieces, large in zip(found["pieces"][0], found["large"][0], strict=True):
        assert pieces["train_loss"] == pytest.approx(large["train_loss"], rel=1e-5)
    # Adam's first steps divide by gradients as small as rounding, so weights agree less than losses do.
    assert torch.allclose(found["pieces"][1], found["large"][1], atol=1e-3)


def test_steps_of_an_epoch_are_what_its_batches_fill(tmp_path) -> None:
    task, _ = build(tmp_path, accumulate_steps=2)
    sizes = [[len(share.batch.features) for share in step] for step in task.batches(0, 0)]
    assert sizes == [[4, 4], [3]] and task.steps_per_epoch == 2
    (rest,) = task.batches(0, 1)
    assert [len(share.batch.features) for share in rest] == [3]


@pytest.mark.parametrize(
    ("scores", "patience", "min_delta", "enough"),
    [
        ([], 1, 0.0, False),
        ([1.0], 1, 0.0, False),
        ([1.0, 1.0], 1, 0.0, True),  # as good is no gain
        ([1.0, 1.2], 1, 0.3, True),
        ([1.0, 1.2, 1.4], 2, 0.3, False),  # small gains add up: 1.4 is more than 0.3 above 1.0
        ([3.0, 1.0, 2.0], 2, 0.0, True),  # above the one before is not above the best
        ([-math.inf, -math.inf, 1.0], 2, 0.0, False),
        ([0.0, -math.inf, -math.inf], 2, 0.0, True),
    ],
)
def test_when_a_run_has_seen_enough(scores, patience, min_delta, enough) -> None:
    assert is_enough(scores, EarlyStopping(patience=patience, min_delta=min_delta)) is enough
    assert not is_enough(scores, None)


def test_early_stopping_ends_the_run_and_leaves_the_plan(tmp_path, monkeypatch, capsys) -> None:
    """Validation that gains nothing after the second epoch: with patience 3 the fifth is the last."""
    logged, log = logger()
    options = dict(num_epochs=20, log_every_steps=1, early_stopping={"patience": 3, "min_delta": 0.0})
    task, journal = build(tmp_path, log=log, **options)
    ciders = iter([0.1, 0.5, 0.2, 0.5, 0.4])
    monkeypatch.setattr(task, "val_cider", lambda *arguments: next(ciders))
    run(task, journal)
    assert [record["epoch"] for record in task.history] == [1, 2, 3, 4, 5]
    assert task.best.epoch == 1 and task.best.cider == 0.5
    assert "no gain, so it ends 15 epochs early" in capsys.readouterr().out
    longer, log = logger()
    task, journal = build(tmp_path, log=log, **(options | {"early_stopping": None}))
    run(task, journal)
    rates = [
        [v["train/learning_rate"] for _, v in entries if "train/learning_rate" in v] for entries in (logged, longer)
    ]
    assert rates[0] == rates[1][:15] and len(rates[1]) == 60


@pytest.mark.parametrize(("select_by", "epoch"), [("CIDEr", 2), ("loss", 1)])
def test_the_model_is_chosen_by_what_params_say(tmp_path, monkeypatch, select_by: str, epoch: int) -> None:
    task, journal = build(tmp_path, num_epochs=4, select_by=select_by)
    found = iter([(5.0, 0.3), (2.0, 0.1), (3.0, 0.9), (math.nan, 0.8)])
    kept = []

    def evaluate():
        loss, cider = next(found)
        kept.append({name: value.clone() for name, value in task.decoder.state_dict().items()})
        return Tally(loss, 1, 1), cider

    monkeypatch.setattr(task, "evaluate", evaluate)
    run(task, journal)
    assert task.best.epoch == epoch and task.best.cider == task.history[epoch]["val_CIDEr"]
    assert_same(task.best.state, kept[epoch])


def test_an_epoch_that_cannot_be_scored_is_better_than_none() -> None:
    best = Best()
    for epoch, loss in enumerate([math.nan, math.nan, 7.0, 7.0]):
        best.offer(score_of({"val_loss": loss}, "loss"), 0.0, epoch, {"w": torch.tensor(epoch)})
        assert best.epoch == min(epoch, 2) if epoch >= 2 else best.epoch == 0
    assert best.state["w"] == 2


def test_the_average_is_that_of_all_steps() -> None:
    model = torch.nn.Linear(3, 2)
    model.register_buffer("count", torch.zeros(1))
    average = Average(model, 0.5)
    wanted = model.weight.detach().double()
    for step in range(30):
        with torch.no_grad():
            model.weight.copy_(torch.full((2, 3), float(step)))
            model.count.fill_(step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * step
    assert torch.allclose(average.model.weight.double(), wanted, atol=1e-4)
    assert average.model.count == 29 and not any(p.requires_grad for p in average.model.parameters())
    assert model.weight.requires_grad and bool((model.weight == 29).all())


def test_the_average_is_what_is_validated_and_kept(tmp_path) -> None:
    """Its loss is the one in the history, and training itself goes on with the plain weights, bit for bit."""
    plain, journal = build(tmp_path, num_epochs=3)
    run(plain, journal)
    task, journal = build(tmp_path, num_epochs=3, ema_decay=0.8, select_by="loss")
    run(task, journal)
    assert_same(task.decoder.state_dict(), plain.decoder.state_dict())
    assert [r["train_loss"] for r in task.history] == [r["train_loss"] for r in plain.history]
    assert task.history[-1]["val_loss"] == foresee(task.average.model, task.val, task.device).loss
    assert task.history[-1]["val_loss"] != plain.history[-1]["val_loss"]
    assert_same(task.best.state, dict(task.average.model.state_dict()))  # the loss still falls: the last is the best


def test_a_step_that_is_not_finite_leaves_the_average_alone(tmp_path, monkeypatch) -> None:
    task, journal = build(tmp_path, num_epochs=1, ema_decay=0.9)
    real, states = task._losses, []

    def train_step(shares, step, stop, inner=task.train_step):
        monkeypatch.setattr(task, "_losses", lambda share: (x * (math.nan if step == 1 else 1.0) for x in real(share)))
        outcome = inner(shares, step, stop)
        states.append([p.clone() for p in task.average.model.parameters()])
        return outcome

    monkeypatch.setattr(task, "train_step", train_step)
    run(task, journal)
    assert_same(states[0], states[1])
    assert not torch.equal(states[1][0], states[2][0])


def test_accuracy_and_perplexity_are_logged_for_training_and_validation(tmp_path) -> None:
    logged, log = logger()
    task, journal = build(tmp_path, log=log, num_epochs=25, log_every_steps=3, label_smoothing=0.1, dropout=0.0)
    run(task, journal)
    train = [values for _, values in logged if "train/loss" in values]
    val = [values for _, values in logged if "val/loss" in values]
    assert all(set(v) == {f"train/{n}" for n in ("loss", "perplexity", "accuracy", "learning_rate", "gradient_norm")}
               for v in train)  # fmt: skip
    assert [math.log(v["val/perplexity"]) for v in val] == pytest.approx([v["val/loss"] for v in val])
    assert train[0]["train/accuracy"] < 0.8 and train[-1]["train/accuracy"] > 0.9 and val[-1]["val/accuracy"] > 0.95
    assert all(math.log(v["train/perplexity"]) < v["train/loss"] for v in train[-3:])  # smoothing is not in it
    assert [record["val_accuracy"] for record in task.history] == [v["val/accuracy"] for v in val]


def test_a_tally_counts_tokens() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    targets = torch.tensor([0, 1, 1])
    tally = Tally()
    tally.add(logits[:2], targets[:2])
    tally.add(logits[2:], targets[2:])
    assert tally.accuracy == pytest.approx(2 / 3) and tally.num_tokens == 3
    wanted = torch.nn.functional.cross_entropy(logits, targets).item()
    assert tally.loss == pytest.approx(wanted) and tally.perplexity == pytest.approx(math.exp(wanted))
    assert Tally(1e6, 0, 1).perplexity == math.inf


class Fixed(torch.nn.Module):
    """Says the same words whatever it reads: logits of one row for each place of a caption."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits  # (steps, vocabulary_size)

    def forward(self, batch) -> torch.Tensor:
        return self.logits[batch.places % batch.targets.shape[-1]]


def batch_of(captions: list[list[list[int]]]):
    return collate(torch.zeros(len(captions), 2, 3), captions, Vocabulary)


def test_sampled_words_are_the_models_own() -> None:
    """It would say 7 8 9, and eos, bos, pad and unk before all of these: words that it will never read."""
    logits = torch.full((4, 10), -50.0)
    logits[:, NEVER_READ] = 50.0
    logits[torch.arange(3), torch.tensor([7, 8, 9])] = 0.0
    batch = batch_of([[[4, 5, 6], [4]], [[5, 5]]])
    mixed = mix_in_own_words(Fixed(logits), batch, 1.0)
    assert mixed.inputs.tolist() == [[[1, 7, 8, 9], [1, 7, 0, 0]], [[1, 7, 8, 0], [0, 0, 0, 0]]]
    assert mix_in_own_words(Fixed(logits), batch, 0.0) is batch
    for name in ("targets", "places", "packed_targets", "features", "kept"):
        assert getattr(mixed, name) is getattr(batch, name)


def test_words_are_sampled_as_often_as_asked_and_from_the_distribution() -> None:
    captions = [[[4] * 20 for _ in range(50)] for _ in range(20)]
    batch = batch_of(captions)
    logits = torch.full((21, 10), -50.0)
    logits[:, 5], logits[:, 6] = math.log(3.0), 0.0  # three to one
    torch.manual_seed(1)
    read = mix_in_own_words(Fixed(logits), batch, 0.25).inputs[..., 1:]
    shares = [float((read == word).float().mean()) for word in (4, 5, 6)]
    assert shares == pytest.approx([0.75, 0.1875, 0.0625], abs=0.01)  # of 20000 words: 3 standard errors


def test_sampling_makes_a_model_rely_less_on_the_words_it_is_given(tmp_path) -> None:
    """Each caption says its image's colour twice: in training, the second word can be copied from the first. Who has
    read words of its own looks at the image instead, so a false first word misleads it less."""
    losses = {}
    for name, sampling in (("never", None), ("always", dict(start_epoch=1, every_epochs=1, increase=1.0, maximum=1.0))):
        task, journal = build(tmp_path, num_epochs=24, scheduled_sampling=sampling, dropout=0.0)
        task.train.captions[:] = [[captions[0][:1] * 2] for captions in task.train.captions]
        run(task, journal)
        batch = next(task.val.epoch()).batch
        false = batch.inputs.clone()
        false[:, :, 1] = 4 + (false[:, :, 1] - 4 + 1) % 3  # another colour
        with torch.no_grad():
            logits = task.decoder.eval()(replace(batch, inputs=false))
        second = batch.places % batch.targets.shape[-1] == 1
        losses[name] = torch.nn.functional.cross_entropy(logits[second], batch.packed_targets[second]).item()
    assert losses["always"] < 0.8 * losses["never"]


def test_the_two_pass_step_is_that_of_the_mixed_batch(tmp_path, monkeypatch) -> None:
    """What the loss sees is the mixed batch, and the sampling pass leaves no gradient behind."""
    sampling = dict(start_epoch=1, every_epochs=1, increase=0.5, maximum=1.0)
    task, _ = build(tmp_path, dropout=0.0, scheduled_sampling=sampling)
    (share, *_) = next(task.batches(0, 0))
    seen = []
    real = task.decoder.read
    monkeypatch.setattr(
        task.decoder, "read", lambda batch: seen.append((batch, torch.is_grad_enabled())) or real(batch)
    )
    task.train_step([share], 0, False)
    assert [grad for _, grad in seen] == [False, True]
    assert seen[0][0].inputs.equal(share.batch.inputs) and not seen[1][0].inputs.equal(share.batch.inputs)


def test_early_end_is_the_unlikelihood_of_an_end_before_the_minimum() -> None:
    batch = batch_of([[[4, 5, 6], [4]]])  # the second ends itself after one word: nothing to say against that
    torch.manual_seed(0)
    logits = torch.randn(batch.num_tokens, 8, dtype=torch.float64, requires_grad=True)
    found = early_end(logits, batch, 2)
    wanted = 0.0
    for row, place in enumerate(batch.places.tolist()):
        step, target = place % 4, batch.packed_targets[row]
        if step < 2 and target != EOS:
            wanted -= math.log(1 - logits[row].softmax(-1)[EOS].item())
    assert found.item() == pytest.approx(wanted) and (batch.packed_targets == EOS).sum() == 2
    found.backward()
    pushed = logits.grad[:, EOS] > 0  # descent lowers eos there, and nowhere else
    assert int(pushed.sum()) == 3 and torch.isfinite(logits.grad).all()


def test_eos_suppression_makes_captions_longer(tmp_path) -> None:
    """Captions of one to four words; with it the model ends fewer of its own before the third word."""
    found = {}
    for name, suppression in (("off", None), ("on", {"min_length": 3, "weight": 20.0})):
        task, journal = build(tmp_path, num_epochs=8, eos_suppression=suppression)
        for number, captions in enumerate(task.train.captions):
            words = captions[0]
            task.train.captions[number] = [words[:1], words[:1], words + words]
        run(task, journal)
        (first, *_) = task.val.epoch()
        with torch.no_grad():
            probabilities = task.decoder.eval()(first.batch).softmax(-1)
        early = first.batch.places % first.batch.targets.shape[-1] < 2
        found[name] = probabilities[early, EOS].mean().item()
    assert found["on"] < 0.8 * found["off"]


def test_validation_captions_have_the_minimum_length(tmp_path) -> None:
    task, _ = build(tmp_path, eos_suppression={"min_length": 3, "weight": 1.0})
    with torch.no_grad():
        task.decoder.output.bias[EOS] = 100.0  # it would end at once
    lengths = []
    real = task.val_cider.vocabulary.decode
    task.val_cider.vocabulary.decode = lambda ids: lengths.append(len([i for i in ids if i != EOS])) or real(ids)
    task.evaluate()
    assert lengths == [3] * 11


def test_doubly_stochastic_is_least_where_each_region_is_seen_once() -> None:
    even = torch.ones(3, 5)
    uneven = torch.zeros(3, 5)
    uneven[:, 0] = 5.0
    assert doubly_stochastic(even) == 0 and doubly_stochastic(uneven) == 3 * (16 + 4)
