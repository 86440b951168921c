"""What is said of wrong values in `train`, above all where a name decides which keys there are."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from captioning.errors import CapstanError
from captioning.params import parse_params

ROOT = Path(__file__).parents[1]
COSINE = {"name": "cosine", "warmup_steps": 50, "min_factor": 0.0}
ADAMW = {"name": "adamw", "betas": [0.9, 0.999], "weight_decay": 0.01}
STILL = {"name": "sgd", "momentum": 0.0, "nesterov": True, "weight_decay": 0.0}
STOPPING = {"patience": 3, "min_delta": 0.0}


def parse(**train):
    tree = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    tree["train"] |= train
    return parse_params(tree)


EVERY = "missing; every key must stand in params.yaml"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scheduler", COSINE | {"warm_steps": 3}, ".warm_steps: unknown key (did you mean warmup_steps?)"),
        ("scheduler", COSINE | {"factor": 0.5}, ".factor: unknown key (of step, exponential, plateau only)"),
        ("scheduler", COSINE | {"name": "cosin"}, ".name: unknown scheduler name 'cosin'. Did you mean 'cosine'?"),
        ("scheduler", {"warmup_steps": 1}, f".name: {EVERY}"),
        ("scheduler", COSINE | {"name": "plateau"}, f".patience: {EVERY}"),
        ("scheduler", COSINE | {"min_factor": 1.5}, ".min_factor: Input should be less than 1 (got 1.5)"),
        ("optimizer", ADAMW | {"momentum": 0.9}, ".momentum: unknown key (of sgd, rmsprop only)"),
        ("optimizer", ADAMW | {"name": "lion"}, ".name: unknown optimizer name 'lion'"),
        ("optimizer", ADAMW | {"betas": [0.9]}, ".betas"),
        ("optimizer", ADAMW | {"betas": [0.9, 1.0]}, ".betas.1: Input should be less than 1"),
        ("optimizer", STILL, ": nesterov: true needs a momentum above 0"),
        ("early_stopping", STOPPING | {"patients": 2}, ".patients: unknown key (did you mean patience?)"),
        ("ema_decay", 1.0, ": Input should be less than 1"),
        ("accumulate_steps", 0, ": Input should be greater than 0"),
        ("select_by", "METEOR", ": Input should be 'CIDEr' or 'loss'"),
    ],
)
def test_wrong_values_are_refused_by_path(key: str, value, message: str) -> None:
    with pytest.raises(CapstanError) as caught:
        parse(**{key: value})
    assert f"train.{key}{message}" in str(caught.value)


def test_what_can_be_off_is_off_by_null() -> None:
    off = parse(clip_norm=None, clip_value=None, ema_decay=None, early_stopping=None, scheduled_sampling=None).train
    assert off.clip_norm is None and off.early_stopping is None
    on = parse(clip_value=0.1, early_stopping=STOPPING, ema_decay=0.999).train
    assert on.early_stopping.patience == 3 and on.ema_decay == 0.999


def test_a_caption_cannot_be_longer_at_least_than_at_most() -> None:
    tree = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    tree["generate"]["min_length"] = 31
    with pytest.raises(CapstanError, match=r"generate: min_length \(31\) is above max_length \(30\)"):
        parse_params(tree)
