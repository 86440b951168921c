"""A captioner on disk: a directory that captions an image with nothing else.

`model.safetensors` holds the encoder's and the decoder's weights, `config.json` the architecture, the encoder and its
transform, `vocabulary.json` the words, `training.json` how it came to be, `manifest.json` the digests of all of them.
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
from captioning.encoders import Encoder, rebuild_encoder
from captioning.errors import CapstanError
from captioning.tensor_files import parse_tensors
from captioning.vocabulary import Vocabulary

SCHEMA_VERSION = 3
"""2: encoders by stages. 3: decoders' options and Transformers."""


@dataclass
class Captioner:
    """A trained encoder-decoder pair, in evaluation mode. `encoder` is None where only cached features are decoded."""

    decoder: Decoder
    vocabulary: Vocabulary
    config: dict[str, Any]
    encoder: Encoder | None = None

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.config["encoder"]["grid"]
        return height, width

    @property
    def num_extra(self) -> int:
        """Regions before the grid's: 1 with a class token."""
        return int(self.config["encoder"]["class_token"])

    @property
    def live_precision(self) -> str | None:
        """Of the encoder, where it was trained in live mode: then cached features are not its own."""
        precision: str | None = self.config["live_precision"]
        return precision


def save_captioner(
    folder: Path,
    encoder: Encoder,
    decoder_state: dict[str, Tensor],
    config: DecoderConfig,
    vocabulary: Vocabulary,
    training: dict[str, Any],
    live_precision: str | None = None,
) -> None:
    """Commits the complete model directory; `training` becomes `training.json`. `live_precision`: see `Captioner`."""
    from safetensors.torch import save

    weights = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    weights |= {f"decoder.{name}": tensor for name, tensor in decoder_state.items()}
    described = {"schema_version": SCHEMA_VERSION, "encoder": encoder.describe(), "decoder": asdict(config)}
    described["live_precision"] = live_precision
    with storage.commit(folder, {"schema_version": SCHEMA_VERSION}) as files:
        files.write("model.safetensors", save({name: t.cpu().contiguous().clone() for name, t in weights.items()}))
        for name, content in (("config", described), ("vocabulary", vocabulary.to_dict()), ("training", training)):
            files.write(f"{name}.json", storage.dump_json(content))


def load_captioner(folder: Path, with_encoder: bool = False) -> Captioner:
    """Loads a model directory on CPU; every byte is compared with the directory's manifest.

    Args:
        with_encoder: always; else where it was trained in live mode.

    Raises:
        CapstanError: a file is missing, damaged, or does not fit the others; names it.
    """
    for name in ("config.json", "vocabulary.json", "model.safetensors", storage.MANIFEST):
        if not (folder / name).is_file():
            raise CapstanError(f"{folder / name} is missing: {folder} is no model directory (run `dvc repro train`)")
    manifest = storage.read_manifest(folder)
    config, words = (
        json.loads(storage.read_committed(folder, f"{name}.json", manifest)) for name in ("config", "vocabulary")
    )
    if config.get("schema_version") != SCHEMA_VERSION:
        raise CapstanError(f"{folder}/config.json has schema {config.get('schema_version')}, expected {SCHEMA_VERSION}")
    weights = parse_tensors(storage.read_committed(folder, "model.safetensors", manifest))
    decoder = build_decoder(DecoderConfig(**config["decoder"]))
    _load_weights(decoder, weights, "decoder.", folder)
    encoder = None
    if with_encoder or config["live_precision"]:
        encoder = rebuild_encoder(config["encoder"])
        _load_weights(encoder, weights, "encoder.", folder)
        encoder.weights_digest = config["encoder"]["weights_digest"]
    return Captioner(decoder.eval(), Vocabulary.from_dict(words, folder / "vocabulary.json"), config, encoder)


def _load_weights(module: torch.nn.Module, weights: dict[str, Tensor], prefix: str, folder: Path) -> None:
    state = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CapstanError(f"{folder}: model.safetensors does not fit config.json: {error!s:.300}") from error
