"""Each schedule against torch's own scheduler where there is one, or against the formula of its paper, step by step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch.optim import lr_scheduler

from captioning.schedules import SCHEDULES, Course, cosine_with_warmup, learning_rate_factor, sampling_probability
from captioning.train_params import ScheduledSampling, SchedulerSettings

NUM_STEPS, PER_EPOCH = 60, 7
OPTIONS = {
    "constant": {},
    "cosine": {},
    "step": {"every_epochs": 2, "factor": 0.3},
    "exponential": {"factor": 0.6},
    "one_cycle": {"peak_at": 0.3, "start_factor": 0.04},
    "inverse_square_root": {},
    "plateau": {"factor": 0.5, "patience": 1, "min_delta": 0.1},
}


def scheduler(name: str, warmup_steps: int = 0, min_factor: float = 0.0, **options):
    values = {"name": name, "warmup_steps": warmup_steps, "min_factor": min_factor, **OPTIONS[name], **options}
    return TypeAdapter(SchedulerSettings).validate_python(values)


def curve(settings, first: int = 0, num_steps: int = NUM_STEPS) -> list[float]:
    course = Course(NUM_STEPS, PER_EPOCH)
    return [learning_rate_factor(step, settings, course) for step in range(first, num_steps)]


def torchs(build, num_steps: int = NUM_STEPS, per: int = 1) -> list[float]:
    """The rates of a scheduler of torch's on a base rate of 1, which is told of every `per`-th step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference, rates = build(optimizer), []
    for step in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % per == 0 and step + 1 < num_steps:
            reference.step()
    return rates


def test_every_scheduler_of_params_is_built() -> None:
    assert set(OPTIONS) == set(SCHEDULES)
    for name in SCHEDULES:
        assert scheduler(name).name == name


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_cosine_is_torchs(floor: float) -> None:
    found = torchs(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=NUM_STEPS, eta_min=floor))
    assert curve(scheduler("cosine", min_factor=floor)) == pytest.approx(found, abs=1e-12)


def test_step_is_torchs() -> None:
    found = torchs(lambda o: lr_scheduler.StepLR(o, 2, 0.3), per=PER_EPOCH)
    assert curve(scheduler("step")) == pytest.approx(found)


def test_exponential_is_torchs() -> None:
    found = torchs(lambda o: lr_scheduler.ExponentialLR(o, 0.6 ** (1 / PER_EPOCH)))
    assert curve(scheduler("exponential")) == pytest.approx(found)


@pytest.mark.parametrize("peak_at", [0.3, 0.5, 0.85])
def test_one_cycle_is_torchs(peak_at: float) -> None:
    def build(optimizer):
        options = dict(pct_start=peak_at, div_factor=25, final_div_factor=8, cycle_momentum=False)
        return lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=NUM_STEPS, **options)

    settings = scheduler("one_cycle", min_factor=1 / 25 / 8, peak_at=peak_at)
    assert curve(settings) == pytest.approx(torchs(build), abs=1e-12)


def test_inverse_square_root_is_that_of_the_paper() -> None:
    """Vaswani et al. 2017, equation 3, divided by its highest value: step ** -0.5 at the end of warm-up."""
    warmup = 12  # their warm-up counts the step at which the rate is highest, ours those before it
    wanted = [min(s**-0.5, s * warmup**-1.5) / warmup**-0.5 for s in range(1, NUM_STEPS + 1)]
    assert curve(scheduler("inverse_square_root", warmup_steps=warmup - 1)) == pytest.approx(wanted)


def test_constant_is_constant() -> None:
    assert curve(scheduler("constant")) == [1.0] * NUM_STEPS


@pytest.mark.parametrize("patience", [0, 1, 3])
@pytest.mark.parametrize("floor", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(4))
def test_plateau_is_torchs_at_every_epoch_of_any_history(patience: int, floor: float, seed: int) -> None:
    """The rate is told from the history alone, so there is no state that a resumed run could lack."""
    scores = np.random.default_rng(seed).normal(size=40).cumsum().round(2).tolist()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    options = dict(factor=0.5, patience=patience, threshold=0.1, threshold_mode="abs", min_lr=floor, eps=0)
    reference = lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", **options)
    settings = scheduler("plateau", min_factor=floor, patience=patience)
    for epoch in range(41):
        course = Course(1000, PER_EPOCH, scores[:epoch])
        assert learning_rate_factor(epoch * PER_EPOCH, settings, course) == optimizer.param_groups[0]["lr"]
        if epoch < 40:
            reference.step(scores[epoch])
    assert optimizer.param_groups[0]["lr"] < 1


@pytest.mark.parametrize("name", list(OPTIONS))
def test_warmup_is_a_straight_line_and_then_the_curve(name: str) -> None:
    found = curve(scheduler(name, warmup_steps=10))
    assert np.allclose(np.diff(found[:11], 2), 0, atol=1e-12) and found[0] == pytest.approx(found[10] / 11)
    if name in ("cosine", "exponential", "one_cycle"):  # begin when warm-up ends
        plain = [learning_rate_factor(step, scheduler(name), Course(NUM_STEPS - 10, PER_EPOCH)) for step in range(50)]
        assert found[10:] == pytest.approx(plain)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_no_rate_after_warmup_is_below_the_minimum(name: str) -> None:
    options = {"one_cycle": {"start_factor": 0.6}}.get(name, {})
    settings = scheduler(name, warmup_steps=3, min_factor=0.5, **options)
    course = Course(NUM_STEPS, PER_EPOCH, [0.0] * 30)
    found = [learning_rate_factor(step, settings, course) for step in range(3, 2 * NUM_STEPS)]
    assert min(found) >= 0.5 and (name == "constant" or min(found) < 0.51)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_a_resumed_run_goes_on_with_the_same_rates(name: str) -> None:
    settings = scheduler(name, warmup_steps=5)
    assert curve(settings, first=23) == curve(settings)[23:]


def test_blips_cosine_is_the_same() -> None:
    assert curve(scheduler("cosine", warmup_steps=10)) == [cosine_with_warmup(s, 10, NUM_STEPS) for s in range(60)]
    assert cosine_with_warmup(100, 10, 100) == cosine_with_warmup(500, 10, 100) == 0


def test_sampling_grows_by_steps_of_epochs() -> None:
    settings = ScheduledSampling(start_epoch=3, every_epochs=2, increase=0.1, maximum=0.25)
    found = [sampling_probability(epoch, settings) for epoch in range(9)]
    assert found == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.25, 0.25, 0.25])
    assert sampling_probability(100, None) == 0 and math.isclose(sampling_probability(1000, settings), 0.25)
