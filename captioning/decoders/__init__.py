"""Decoders: from an image's regions to words. `DECODERS` is the registry; `base.Decoder` is what all of them offer."""

from __future__ import annotations

from collections.abc import Callable

from captioning.decoders.base import Decoder, DecoderConfig
from captioning.decoders.recurrent import build_recurrent
from captioning.errors import unknown_name

DECODERS: dict[str, Callable[[DecoderConfig], Decoder]] = {
    "lstm": build_recurrent,
    "gru": build_recurrent,
}


def check_decoder(name: str) -> None:
    """Raises CapstanError, listing the choices, unless the type is registered."""
    if name not in DECODERS:
        raise unknown_name("decoder type", name, DECODERS)


def build_decoder(config: DecoderConfig) -> Decoder:
    """Builds an untrained decoder from its architecture."""
    check_decoder(config.type)
    return DECODERS[config.type](config)


__all__ = ["DECODERS", "Decoder", "DecoderConfig", "build_decoder", "check_decoder"]
