"""`python -m captioning recipe`: every recipe fits params.yaml, and changes what it names alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from captioning.cli import apply_recipe, merge
from captioning.errors import CapstanError
from captioning.params import load_params

ROOT = Path(__file__).parents[1]


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    return path


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_recipe_gives_valid_params(recipe: Path, params: Path) -> None:
    apply_recipe(recipe, params)
    load_params(params)


def test_lines_that_a_recipe_does_not_name_stay_as_they_are(params: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {num_epochs: 3}\n")
    before = params.read_text().splitlines()
    apply_recipe(recipe, params)
    after = params.read_text().splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert [new.split() for _, new in changed] == [["num_epochs:", "3", "#", "or", "auto"]]


def test_another_kind_replaces_all_keys_and_the_same_kind_merges() -> None:
    tree = {"optimizer": {"name": "adamw", "betas": [0.9, 0.999], "weight_decay": 0.01}}
    merge(tree, {"optimizer": {"weight_decay": 0.1}})
    assert tree["optimizer"] == {"name": "adamw", "betas": [0.9, 0.999], "weight_decay": 0.1}
    merge(tree, {"optimizer": {"name": "adagrad", "weight_decay": 0.0}})
    assert tree["optimizer"] == {"name": "adagrad", "weight_decay": 0.0}


def test_a_recipe_with_an_unknown_key_writes_nothing(params: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {num_epoch: 3}\n")
    before = params.read_text()
    with pytest.raises(CapstanError, match="did you mean num_epochs"):
        apply_recipe(recipe, params)
    assert params.read_text() == before and YAML(typ="safe").load(before)


@pytest.mark.parametrize("text", [None, "train: {num_epochs: 3"])
def test_a_params_file_that_is_missing_or_not_yaml_is_named(params: Path, text: str | None) -> None:
    params.unlink() if text is None else params.write_text(text)
    with pytest.raises(CapstanError, match=r"params\.yaml is (missing|not valid YAML)"):
        apply_recipe(ROOT / "recipes" / "flickr8k.yaml", params)


def test_a_recipe_that_is_not_yaml_is_named(params: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {num_epochs: 3")
    before = params.read_text()
    with pytest.raises(CapstanError, match=r"recipe\.yaml is not valid YAML"):
        apply_recipe(recipe, params)
    assert params.read_text() == before
