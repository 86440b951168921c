"""A captioner on disk: a directory that captions an image with nothing else.

`model.safetensors` holds the encoder's and the decoder's weights, `config.json` the architecture, the encoder and its
transform, `vocabulary.json` the words, `training.json` how it came to be.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captioning import storage
from captioning.decoders import Decoder, DecoderConfig, build_decoder
from captioning.encoders import Encoder, build_encoder
from captioning.errors import CapstanError
from captioning.vocabulary import Vocabulary

SCHEMA_VERSION = 1


@dataclass
class Captioner:
    """A trained encoder-decoder pair, in evaluation mode. `encoder` is None where only features are decoded."""

    decoder: Decoder
    vocabulary: Vocabulary
    config: dict[str, Any]
    encoder: Encoder | None = None

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.config["encoder"]["grid"]
        return height, width


def save_captioner(
    folder: Path, encoder: Encoder, decoder_state: dict[str, Tensor], config: DecoderConfig, vocabulary: Vocabulary
) -> None:
    """Writes the model's files into `folder`; `training.json` is the caller's."""
    from safetensors.torch import save_file

    weights = {f"encoder.{k}": v.contiguous() for k, v in encoder.state_dict().items()}
    weights |= {f"decoder.{k}": v.contiguous().clone() for k, v in decoder_state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with storage.atomic_write(folder / "model.safetensors") as temporary:
        save_file({name: tensor.cpu() for name, tensor in weights.items()}, temporary)
    vocabulary.save(folder / "vocabulary.json")
    storage.write_json(
        folder / "config.json",
        {"schema_version": SCHEMA_VERSION, "encoder": encoder.describe(), "decoder": asdict(config)},
    )


def load_captioner(folder: Path, with_encoder: bool = False) -> Captioner:
    """Loads a model directory on CPU.

    Raises:
        CapstanError: a file is missing, damaged, or does not fit the others; names it.
    """
    for name in ("config.json", "vocabulary.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise CapstanError(f"{folder / name} is missing: {folder} is no model directory (run `dvc repro train`)")
    config = storage.read_json(folder / "config.json")
    if config.get("schema_version") != SCHEMA_VERSION:
        raise CapstanError(f"{folder}/config.json has schema {config.get('schema_version')}, expected {SCHEMA_VERSION}")
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    decoder = build_decoder(DecoderConfig(**config["decoder"]))
    _load_weights(decoder, folder, "decoder.")
    encoder = None
    if with_encoder:
        encoder = build_encoder(config["encoder"]["name"], "random")
        _load_weights(encoder, folder, "encoder.")
        encoder.weights_digest = config["encoder"]["weights_digest"]
    return Captioner(decoder.eval(), vocabulary, config, encoder)


def _load_weights(module: torch.nn.Module, folder: Path, prefix: str) -> None:
    from safetensors import SafetensorError, safe_open

    path = folder / "model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            state = {
                name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)
            }
        module.load_state_dict(state)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise CapstanError(f"{path} is damaged or does not fit {folder}/config.json: {error!s:.300}") from error


def read_training(folder: Path) -> dict[str, Any]:
    """`training.json` of a model directory: resolved hyperparameters, history, command, environment."""
    value: dict[str, Any] = json.loads((folder / "training.json").read_text("utf-8"))
    return value
