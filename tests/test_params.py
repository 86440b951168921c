from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from captioning.errors import CapstanError
from captioning.param_types import Section
from captioning.params import load_params, parse_params

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tree() -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(ROOT / "params.yaml")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_projects_own_params_are_valid() -> None:
    params = load_params(ROOT / "params.yaml")
    assert params.captioners() == [
        "efficientnet_lite0-lstm",
        "efficientnet_lite0-gru",
        "efficientnet_lite0-transformer",
        "blip",
    ]


def test_no_field_has_a_default() -> None:
    """Else a result would depend on a value that DVC does not see."""

    def sections(kind: type[Section]) -> list[type[Section]]:
        return [kind, *(below for child in kind.__subclasses__() for below in sections(child))]

    defaults = [
        f"{s.__name__}.{n}" for s in sections(Section) for n, f in s.model_fields.items() if not f.is_required()
    ]
    assert defaults == []


def test_unknown_keys_are_named_with_their_path(tree) -> None:
    tree["train"]["clip_nrm"] = 1
    tree["source_settings"]["flickr8k"]["images"]["ur"] = 1
    tree["encoder"] = []
    with pytest.raises(CapstanError) as caught:
        parse_params(tree)
    message = str(caught.value)
    assert "train.clip_nrm: unknown key (did you mean clip_norm?)" in message
    assert "source_settings.flickr8k.images.ur: unknown key (did you mean url?)" in message
    assert "encoder: unknown key (did you mean encoders?)" in message


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.num_epochs", "many", "train.num_epochs: Input should be a valid integer"),
        ("train.num_epochs", 0, "train.num_epochs: Input should be greater than 0"),
        ("train.clip_norm", float("nan"), "train.clip_norm"),
        ("decoder_settings.lstm.dropout", 1.5, "decoder_settings.lstm.dropout: Input should be less than 1"),
        ("decoder_settings.lstm.attention", "luong", "decoder_settings.lstm.attention: Input should be 'none'"),
        ("decoders", ["lstm", "rnn"], "'rnn' has no decoder_settings.rnn"),
        ("decoders", ["lstm", "lstm"], "stands twice"),
        ("encoders", ["../x"], "letters, digits and underscores"),
        ("data.sources", ["flickr9k"], "unknown source 'flickr9k'. Did you mean 'flickr8k'?"),
        ("blip", None, "blip"),
    ],
)
def test_wrong_values_are_refused_by_path(tree, path, value, message) -> None:
    *sections, key = path.split(".")
    place = tree
    for section in sections:
        place = place[section]
    place[key] = value
    with pytest.raises(CapstanError) as caught:
        parse_params(tree)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "lstm",
            {"attention": "none"},
            "lstm: attention none has no attention_dim: set it to null; attention none has no",
        ),
        ("lstm", {"attention": "none", "attention_dim": None}, "attention none has no context_gate: set it to false"),
        (
            "gru",
            {"attention": "none", "doubly_stochastic": 1.0},
            "attention none has no doubly_stochastic: set it to 0",
        ),
        ("gru", {"attention": "none", "input_feeding": True}, "attention none has no input_feeding: set it to false"),
        ("lstm", {"attention_dim": None}, "lstm: attention bahdanau needs attention_dim"),
        (
            "gru",
            {"attention": "luong_dot", "region_dim": 99},
            "luong_dot needs region_dim (99) equal to hidden_dim (384)",
        ),
        ("gru", {"tied_embeddings": True}, "tied_embeddings needs embedding_dim (256) equal to hidden_dim (384)"),
        ("gru", {"embeddings": "glove_6B_50d"}, "embeddings glove_6B_50d needs embedding_dim 50, not 256"),
        ("transformer", {"num_heads": 3}, "transformer: num_heads (3) does not divide hidden_dim (256)"),
        ("transformer", {"num_positions": None}, "positions learned needs num_positions"),
        ("transformer", {"positions": "sinusoidal"}, "positions sinusoidal have no num_positions: set it to null"),
        ("transformer", {"num_positions": 29}, "num_positions (29) is less than generate.max_length (30)"),
        ("transformer", {"input_feeding": True}, "transformer.input_feeding: unknown key (of lstm, gru only)"),
        ("transformer", {"num_head": 4}, "transformer.num_head: unknown key (did you mean num_heads?)"),
        ("gru", {"num_heads": 4}, "decoder_settings.gru.num_heads: unknown key (of transformer only)"),
        ("gru", {"input_feding": True}, "gru.input_feding: unknown key (did you mean input_feeding?)"),
        (
            "gru",
            {"type": "gruu"},
            "gru.type: unknown decoder type 'gruu'. Did you mean 'gru'? Choices: gru, lstm, trans",
        ),
    ],
)
def test_decoders_refuse_what_does_not_go_together(tree, name, changes, message) -> None:
    tree["decoders"] = ["lstm", "gru", "transformer"]
    tree["decoder_settings"][name] |= changes
    with pytest.raises(CapstanError) as caught:
        parse_params(tree)
    assert message in str(caught.value)


@pytest.mark.parametrize("key", ["type", "num_layers"])
def test_missing_keys_of_a_union_are_named(tree, key) -> None:
    del tree["decoder_settings"]["transformer"][key]
    with pytest.raises(CapstanError, match=f"decoder_settings.transformer.{key}: missing; every key must stand"):
        parse_params(tree)


def test_missing_keys_are_named(tree) -> None:
    del tree["generate"]["num_beams"]
    with pytest.raises(CapstanError, match=r"generate.num_beams: missing; every key must stand in params.yaml"):
        parse_params(tree)


@pytest.mark.parametrize("text", ["5e-4", "5e-04", "5.0e-4", "0.0005", "'5e-04'"])
def test_scientific_numbers_as_dvc_writes_them(tmp_path, text) -> None:
    whole = (ROOT / "params.yaml").read_text().replace("learning_rate: 0.001", f"learning_rate: {text}", 1)
    params = load_params(write(tmp_path / "params.yaml", whole))
    assert params.decoder_settings["lstm"].learning_rate == 0.0005


def test_bad_files_are_explained(tmp_path) -> None:
    with pytest.raises(CapstanError, match="is missing"):
        load_params(tmp_path / "params.yaml")
    with pytest.raises(CapstanError, match="not valid YAML"):
        load_params(write(tmp_path / "params.yaml", "a: [1"))
    with pytest.raises(CapstanError, match="params"):
        load_params(write(tmp_path / "params.yaml", "just words"))
    with pytest.raises(CapstanError, match="not valid YAML"):
        load_params(write(tmp_path / "params.yaml", "a: !!python/object/apply:os.system ['true']"))
