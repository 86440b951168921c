"""Every optimizer by name: its updates are torch's, and a stopped run goes on with the same bits."""

from __future__ import annotations

import json
import math
from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load, save
from torch import nn

from captioning.distributed import ALONE
from captioning.optimization import OPTIMIZERS, Stepper, build_adamw, build_optimizer
from captioning.tensor_files import join_tree, split_tree
from captioning.train_params import OptimizerSettings

BETAS = {"betas": (0.9, 0.99)}
OPTIONS = {
    "adadelta": {"rho": 0.8},
    "adafactor": {},
    "adagrad": {},
    "adam": BETAS,
    "adamax": BETAS,
    "adamw": BETAS,
    "asgd": {},
    "nadam": BETAS,
    "radam": BETAS,
    "rmsprop": {"alpha": 0.9, "momentum": 0.5},
    "sgd": {"momentum": 0.9, "nesterov": True},
}
CLASSES = {name.lower(): name for name in dir(torch.optim)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 5)
        self.output = nn.Linear(5, 7)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.output(self.hidden(self.embedding(words)).tanh())


def settings(name: str, weight_decay: float = 0.05, **options):
    values = {"name": name, "weight_decay": weight_decay, **(options or OPTIONS[name])}
    return TypeAdapter(OptimizerSettings).validate_python(values)


def build(name: str, clip_norm: float | None = None, **options) -> tuple[Model, Stepper]:
    torch.manual_seed(3)
    model = Model()
    optimizer = build_optimizer([(list(model.named_parameters()), 0.05)], settings(name, **options))
    return model, Stepper(optimizer, clip_norm, torch.float32, ALONE)


def loss_at(model: Model, step: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(step)
    words, targets = torch.randint(7, (2, 12), generator=draw)
    return nn.functional.cross_entropy(model(words), targets)


def train(model: Model, stepper: Stepper, steps: range) -> None:
    for step in steps:
        stepper.step(loss_at(model, step), 1 / (step + 1))


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [value.detach().clone() for value in model.state_dict().values()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def through_files(state):
    """As a checkpoint keeps it: tensors in safetensors' format, all else as JSON."""
    plain, tensors = split_tree(state)
    return join_tree(json.loads(json.dumps(plain)), load(save({n: t.contiguous() for n, t in tensors.items()})))


def test_all_names_of_params_have_an_optimizer() -> None:
    sections = get_args(get_args(OptimizerSettings)[0])
    names = {name for section in sections for name in get_args(section.model_fields["name"].annotation)}
    assert names == set(OPTIMIZERS) == set(OPTIONS)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_updates_are_torchs(name: str) -> None:
    model, stepper = build(name)
    torch.manual_seed(3)
    wanted = Model()
    matrices = [p for n, p in wanted.named_parameters() if p.ndim > 1 and "embedding" not in n]
    others = [p for n, p in wanted.named_parameters() if p.ndim == 1 or "embedding" in n]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0}]
    optimizer = getattr(torch.optim, CLASSES[name])(groups, lr=0.05, **OPTIONS[name])
    for step in range(6):
        stepper.step(loss_at(model, step), 1.0)
        optimizer.zero_grad()
        loss_at(wanted, step).backward()
        optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(model), weights(wanted), strict=True))


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("stop", [0, 1, 4, 7])  # radam changes its formula at step 6
def test_a_stopped_run_goes_on_with_the_same_bits(name: str, stop: int) -> None:
    wanted, stepper = build(name)
    before = weights(wanted)
    train(wanted, stepper, range(12))
    first, stepper = build(name)
    train(first, stepper, range(stop))
    kept = through_files({"model": first.state_dict(), "stepper": stepper.state_dict()})
    second, stepper = build(name)
    second.load_state_dict(kept["model"])
    stepper.load_state_dict(kept["stepper"])
    train(second, stepper, range(stop, 12))
    assert same(weights(second), weights(wanted)) and not same(weights(wanted), before)


def test_build_adamw_is_the_same_adamw() -> None:
    model, stepper = build("adamw")
    torch.manual_seed(3)
    other = Model()
    optimizer = build_adamw([(list(other.named_parameters()), 0.05)], 0.05, (0.9, 0.99))
    train(model, stepper, range(4))
    train(other, Stepper(optimizer, None, torch.float32, ALONE), range(4))
    assert same(weights(model), weights(other))


def test_groups_have_rates_of_their_own_and_the_schedule_scales_all() -> None:
    torch.manual_seed(3)
    model = Model()
    parts = [(list(model.output.named_parameters()), 0.1), (list(model.hidden.named_parameters()), 0.01)]
    stepper = Stepper(build_optimizer(parts, settings("sgd")), None, torch.float32, ALONE)
    stepper.step(loss_at(model, 0), 0.5)
    rates = [(group["lr"], group["weight_decay"]) for group in stepper.optimizer.param_groups]
    assert rates == [(0.05, 0.05), (0.05, 0.0), (0.005, 0.05), (0.005, 0.0)]


def test_what_is_frozen_stays_and_learns_once_it_is_not() -> None:
    model, stepper = build("adamw")
    model.hidden.requires_grad_(False)
    before = weights(model.hidden)
    train(model, stepper, range(3))
    assert same(weights(model.hidden), before)  # no decay, no momentum either
    kept = through_files(stepper.state_dict())
    model.hidden.requires_grad_(True)
    train(model, stepper, range(3, 5))
    assert not same(weights(model.hidden), before)
    stepper.load_state_dict(kept)  # of a time when some parameters had no state


def gradients(stepper: Stepper) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in stepper.parameters])


def test_clipping_by_norm_and_by_value() -> None:
    model, plain = build("sgd")
    plain.step(loss_at(model, 0) * 100, 1.0)
    raw = gradients(plain)
    assert plain.gradient_norm == pytest.approx(raw.norm().item()) and raw.norm() > 5
    model, by_norm = build("sgd", clip_norm=2.0)
    by_norm.step(loss_at(model, 0) * 100, 1.0)
    assert torch.allclose(gradients(by_norm), raw * (2 / raw.norm()), rtol=1e-4)
    assert by_norm.gradient_norm == plain.gradient_norm  # what is logged is not clipped
    model, by_both = build("sgd", clip_norm=2.0)
    by_both.clip_value = 0.1
    by_both.step(loss_at(model, 0) * 100, 1.0)
    assert torch.equal(gradients(by_both), gradients(by_norm).clamp(-0.1, 0.1))
    assert gradients(by_norm).abs().max() > 0.1


def test_clipping_by_value_hides_no_infinity() -> None:
    model, stepper = build("adamw")
    stepper.clip_norm, stepper.clip_value = None, 0.1
    before = weights(model)
    value, finite, _ = stepper.step((model.output.bias * torch.tensor(math.inf)).sum() * 0 + loss_at(model, 0), 1.0)
    assert not finite and same(weights(model), before)


def test_pieces_of_a_batch_add_up_and_one_graph_lives_at_a_time() -> None:
    model, whole = build("adamw", clip_norm=1.0)
    value, *_ = whole.step((loss_at(model, 0) + loss_at(model, 1) + loss_at(model, 2)) / 3, 1.0)
    wanted = weights(model)
    model, pieces = build("adamw", clip_norm=1.0)
    alive: list[bool] = []

    def losses():
        import weakref

        before = None
        for step in range(3):
            alive.append(before is not None and before() is not None)
            loss = loss_at(model, step) / 3
            before = weakref.ref(loss)
            yield loss
            del loss

    found, finite, _ = pieces.step_over(losses(), 1.0)
    assert finite and found == pytest.approx(value) and alive == [False] * 3
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(model), wanted, strict=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "sgd", "momentum": 0.0, "nesterov": True, "weight_decay": 0}, "needs a momentum"),
        ({"name": "adam", "betas": (0.9, 1.0), "weight_decay": 0}, "less than 1"),
        ({"name": "sgd", "betas": (0.9, 0.9), "weight_decay": 0}, "Extra inputs"),
        ({"name": "lion", "weight_decay": 0}, "does not match"),
    ],
)
def test_wrong_options_are_refused(values, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(OptimizerSettings).validate_python(values)
