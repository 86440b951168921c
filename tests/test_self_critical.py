"""Self-critical training: the draws, the scores, the gradient against the exact one, and runs that are stopped."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_captions
from ruamel.yaml import YAML
from test_training import Stop, build, run, stop_at
from test_training_options import assert_same, keeper_in, logger

from captioning.datasets import collate
from captioning.decoders import Decoder, DecoderConfig, build_decoder
from captioning.errors import CapstanError
from captioning.interruption import Interrupted
from captioning.metrics.cider import CiderD
from captioning.params import parse_params
from captioning.self_critical import Rewards, SelfCritical, advantages, draw_captions, policy_loss
from captioning.train_params import SelfCriticalTraining
from captioning.vocabulary import SPECIAL, Vocabulary

EOS = Vocabulary.eos_id
VOCABULARY_SIZE = 7  # three words beside the special ones
SIZES: dict[str, dict[str, Any]] = {
    "lstm": {"attention": "bahdanau", "embedding_dim": 5, "attention_dim": 4, "region_dim": 4, "context_gate": True},
    "gru": {"attention": "luong_general", "embedding_dim": 5, "region_dim": 4},
    "transformer": {"num_layers": 1, "num_heads": 2, "feedforward_dim": 8},
}


def decoder_of(kind: str, vocabulary_size: int = VOCABULARY_SIZE, dropout: float = 0.0) -> Decoder:
    torch.manual_seed(0)
    sizes = {"vocabulary_size": vocabulary_size, "encoder_dim": 3, "hidden_dim": 6, "dropout": dropout} | SIZES[kind]
    decoder = build_decoder(DecoderConfig(type=kind, **sizes))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(2)  # not all words alike
    return decoder.eval()


def critic_of(captions: Any, num_samples: int, max_length: int) -> SelfCritical:
    settings = SelfCriticalTraining(start_epoch=2, num_samples=num_samples, rate_factor=1, cross_entropy_weight=0)
    return SelfCritical(captions, settings, max_length)


def sequences(max_length: int) -> list[list[int]]:
    """All that can be said: words, and an end unless cut."""
    words = range(len(SPECIAL), VOCABULARY_SIZE)
    ended = [
        [*said, EOS] for length in range(max_length) for said in itertools.product(words, repeat=length)
    ]  # fmt: skip
    return ended + [list(said) for said in itertools.product(words, repeat=max_length)]


def log_probability(decoder: Decoder, features: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Of one caption of one image, by policy_loss of an advantage of -1."""
    return policy_loss(decoder, features, [[tokens]], torch.tensor([[-1.0]]))


@pytest.mark.parametrize("kind", SIZES)
def test_captions_are_drawn_as_often_as_they_are_likely(kind: str) -> None:
    decoder, features = decoder_of(kind), torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    possible = sequences(2)
    torch.manual_seed(3)
    drawn = draw_captions(decoder, features, 4000, 2)
    for image in range(2):
        alone = features[image : image + 1]
        probabilities = [log_probability(decoder, alone, tokens).exp().item() for tokens in possible]
        assert sum(probabilities) == pytest.approx(1, abs=1e-4)  # cut captions included
        counts = Counter(map(tuple, drawn[image]))
        assert set(counts) <= set(map(tuple, possible))
        for tokens, probability in zip(possible, probabilities, strict=True):
            error = (probability * (1 - probability) / 4000) ** 0.5
            assert counts[tuple(tokens)] / 4000 == pytest.approx(probability, abs=5 * error + 1e-4)


def test_draws_repeat_with_the_seed_and_images_do_not_change_places() -> None:
    decoder, features = decoder_of("lstm"), torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1))
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(draw_captions(decoder, features, 3, 5))
    assert found[0] == found[1] != found[2]
    assert all(len(tokens) == 5 or tokens[-1] == EOS for samples in found[0] for tokens in samples)
    with torch.no_grad():  # an image whose captions end at once leaves first; the others keep their places
        torch.nn.init.zeros_(decoder.output.weight)
        decoder.output.bias[EOS] = 50
    assert draw_captions(decoder, features, 2, 5) == [[[EOS], [EOS]]] * 6


def test_scores_are_cider_d_with_the_end_as_a_word() -> None:
    captions = [group for group in random_captions(12, 40, seed=2) if group]
    critic = critic_of(captions, 2, 9)
    batch = collate(torch.zeros(len(captions), 4, 3), captions, Vocabulary)
    drawn = [[[*group[0], EOS], [5, 6, 7]] for group in captions]
    order = sorted(range(len(captions)), key=lambda i: -max(map(len, captions[i])))  # as collate lays them out
    found = critic.score(batch, [drawn[i] for i in order])
    metric = CiderD([[[*map(str, words), "."] for words in group] for group in captions])
    for sample in range(2):
        said = [[str(token) if token != EOS else "." for token in samples[sample]] for samples in drawn]
        expected = metric.score(said)[1]
        np.testing.assert_allclose(found[:, sample].numpy(), expected[order], rtol=1e-12, atol=1e-15)


def test_an_advantage_is_over_the_mean_of_the_others() -> None:
    scores = torch.tensor([[1.0, 2.0, 6.0], [3.0, 3.0, 3.0]])
    expected = [[1 - 4, 2 - 3.5, 6 - 1.5], [0, 0, 0]]
    torch.testing.assert_close(advantages(scores), torch.tensor(expected))


@pytest.mark.parametrize("kind", SIZES)
def test_the_gradient_is_that_of_the_expected_score(kind: str) -> None:
    """Averaged over many draws, it is the gradient of -Σ P(caption) · score, summed over all captions there are."""
    decoder, features = decoder_of(kind), torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(1))
    captions = [[[4, 5], [5, 5]], [[6, 4]], [[5]]]
    critic = critic_of(captions, 50, 2)
    batch = collate(features, captions[:1], Vocabulary)
    possible = sequences(2)
    scores = critic.score(batch, [possible])[0]
    likely = torch.stack([log_probability(decoder, features, tokens).exp() for tokens in possible])
    expected_score = (likely * scores).sum()
    (-expected_score).backward()
    exact = torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None])
    decoder.zero_grad()
    torch.manual_seed(0)
    rewards = Rewards()
    for _ in range(60):
        (critic.loss_sum(decoder, batch, rewards) / (60 * 2)).backward()  # the image has 2 captions
    found = torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None])
    assert float((found - exact).norm() / exact.norm()) < 0.15
    assert rewards.number == 3000
    assert rewards.total / rewards.number == pytest.approx(expected_score.item(), rel=0.05)


SELF_CRITICAL = {"self_critical": {"start_epoch": 3, "num_samples": 3, "rate_factor": 0.1, "cross_entropy_weight": 0.0}}


def test_scores_rise_and_the_schedule_ends_before(tmp_path) -> None:
    logged, log = logger()
    changes = SELF_CRITICAL | {"num_epochs": 12, "log_every_steps": 1}
    task, journal = build(tmp_path, log=log, **changes)
    run(task, journal)
    rates = [values["train/learning_rate"] for _, values in logged if "train/learning_rate" in values]
    plain, journal = build(tmp_path, num_epochs=2)
    assert rates[:6] == pytest.approx([0.02 * plain._rate_factor(step) for step in range(6)])
    assert rates[6:] == pytest.approx([0.002] * 30)
    rewards = [values["train/reward"] for _, values in logged if "train/reward" in values]
    assert len(rewards) == 30 and np.mean(rewards[-6:]) > 1.5 * np.mean(rewards[:6])
    assert sum("train/loss" in values for _, values in logged) == 6
    assert task.history[-1]["val_CIDEr"] > task.history[1]["val_CIDEr"]


def test_cross_entropy_beside_it_has_its_weight(tmp_path) -> None:
    """With no advantage in any draw, its gradient is what remains."""
    gradients = []
    for changes in ({}, {"self_critical": SELF_CRITICAL["self_critical"] | {"cross_entropy_weight": 0.25}}):
        task, _ = build(tmp_path, dropout=0.0, num_epochs=4, label_smoothing=0.1, **changes)
        if task.critic is not None:
            task.critic.score = lambda batch, drawn: torch.ones(len(drawn), 3)
            task.rewards = Rewards()
        task.backward(next(task.batches(0, 0)), 0, [slice(0, 4)])
        gradients.append(torch.cat([p.grad.flatten() for p in task.decoder.parameters()]))
    torch.testing.assert_close(gradients[1], 0.25 * gradients[0])


@pytest.mark.parametrize("stops", [[5], [6], [7, 8], [9, 11]])
@pytest.mark.parametrize("kill", [True, False])
def test_a_stopped_run_ends_with_the_same_bits(tmp_path, monkeypatch, stops: list[int], kill: bool) -> None:
    """Before self-critical epochs, where they begin, within, and at an epoch's end."""
    critical = SELF_CRITICAL["self_critical"] | {"cross_entropy_weight": 0.5}
    changes: dict[str, Any] = {"num_epochs": 4, "log_every_steps": 1, "ema_decay": 0.9, "self_critical": critical}
    wanted_log, log = logger()
    wanted, journal = build(tmp_path, log=log, **changes)
    run(wanted, journal)
    for stop in [*stops, None]:
        logged, log = logger()
        task, journal = build(tmp_path, log=log, **changes)
        keeper = keeper_in(tmp_path)
        stop_at(task, stop, kill, monkeypatch)
        if stop is None:
            run(task, journal, keeper)
        else:
            with pytest.raises(Stop if kill else Interrupted):
                run(task, journal, keeper)
    assert_same(task.state_dict(), wanted.state_dict())
    assert logged == wanted_log


def test_a_step_without_finite_logits_is_skipped(tmp_path, monkeypatch) -> None:
    """As with cross entropy, and not an error of the draw; a run of them ends with the advice."""
    task, journal = build(tmp_path, num_epochs=4, max_skipped_steps=2, **SELF_CRITICAL)
    broken = [6, 10]
    steps = iter(range(10**6))

    def train_step(shares: Any, step: int, stop: bool, plain: Any = task.train_step) -> Any:
        if next(steps) in broken:
            shares = [replace(s, batch=replace(s.batch, features=s.batch.features * torch.nan)) for s in shares]
        return plain(shares, step, stop)

    monkeypatch.setattr(task, "train_step", train_step)
    loop = run(task, journal)
    assert loop.position.step == 12 and loop.position.num_skipped == 2
    assert all(p.isfinite().all() for p in task.decoder.parameters())
    task, journal = build(tmp_path / "2", num_epochs=4, max_skipped_steps=2, **SELF_CRITICAL)
    broken[:] = range(6, 12)
    steps = iter(range(10**6))
    monkeypatch.setattr(task, "train_step", partial(train_step, plain=task.train_step))
    with pytest.raises(CapstanError, match="Lower the learning rate"):
        run(task, journal)


def test_early_stopping_waits_for_the_self_critical_epochs(tmp_path, monkeypatch) -> None:
    changes: dict[str, Any] = {"num_epochs": 8, "early_stopping": {"patience": 2, "min_delta": 9.0}}
    task, journal = build(tmp_path, **SELF_CRITICAL, **changes)
    run(task, journal)
    assert len(task.history) == 5  # of epochs 3, 4 and 5 two in a row gained less than 9
    assert ["policy_loss" in record for record in task.history] == [False, False, True, True, True]


def test_the_weight_does_not_depend_on_the_number_of_samples() -> None:
    decoder, features = decoder_of("gru"), torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(1))
    captions = [[[4, 5], [5, 5]], [[6, 4]], [[5]]]
    batch, sizes = collate(features, captions, Vocabulary), []
    for num_samples in (4, 400):
        critic, found = critic_of(captions, num_samples, 2), []
        for seed in range(200 if num_samples == 4 else 4):
            torch.manual_seed(seed)
            decoder.zero_grad()
            critic.loss_sum(decoder, batch, Rewards()).backward()
            found.append(torch.cat([p.grad.flatten() for p in decoder.parameters()]))
        sizes.append(torch.stack(found).mean(0))
    assert float((sizes[0] - sizes[1]).norm() / sizes[1].norm()) < 0.25


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"select_by": "loss"}, "set select_by to CIDEr"),
        ({"num_epochs": "auto"}, "needs a number for num_epochs"),
        ({"num_epochs": 2}, "start_epoch 3 is after the last of 2 epochs"),
        (
            {"self_critical": {"start_epoch": 1, "num_samples": 3, "rate_factor": 0.1, "cross_entropy_weight": 0.0}},
            "start_epoch",
        ),
        (
            {"self_critical": {"start_epoch": 3, "num_samples": 1, "rate_factor": 0.1, "cross_entropy_weight": 0.0}},
            "num_samples",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    tree = YAML(typ="safe").load(Path(__file__).parents[1] / "params.yaml")
    tree["train"] |= SELF_CRITICAL | changes
    with pytest.raises(CapstanError, match=said) as caught:
        parse_params(tree)
    assert "train" in str(caught.value)
