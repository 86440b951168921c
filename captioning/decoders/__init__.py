"""Decoders: from an image's regions to words. `DECODERS` is the registry; `base.Decoder` is what all of them offer."""

from __future__ import annotations

from collections.abc import Callable

from captioning.decoders.attend_first import AttendFirst
from captioning.decoders.attend_last import AttendLast, ShowAndTell
from captioning.decoders.base import Decoder, DecoderConfig
from captioning.decoders.recurrent import RecurrentDecoder
from captioning.decoders.transformer import TransformerDecoder
from captioning.decoders.word_vectors import start_embedding
from captioning.errors import CapstanError, unknown_name
from captioning.vocabulary import SPECIAL, Vocabulary


def build_recurrent(config: DecoderConfig) -> Decoder:
    """An LSTM or GRU decoder whose shape follows from its attention."""
    shapes = {"none": ShowAndTell, "bahdanau": AttendFirst}
    return shapes.get(config.attention, AttendLast)(config)


DECODERS: dict[str, Callable[[DecoderConfig], Decoder]] = {
    "lstm": build_recurrent,
    "gru": build_recurrent,
    "transformer": TransformerDecoder,
}


def check_decoder(name: str) -> None:
    """Raises CapstanError, listing the choices, unless the type is registered."""
    if name not in DECODERS:
        raise unknown_name("decoder type", name, DECODERS)


def build_decoder(config: DecoderConfig) -> Decoder:
    """Builds an untrained decoder from its architecture."""
    check_decoder(config.type)
    return DECODERS[config.type](config)


def start_decoder(config: DecoderConfig, vocabulary: Vocabulary) -> Decoder:
    """An untrained decoder for a vocabulary, its pretrained word vectors in place.

    Raises:
        CapstanError: the captions are longer than the decoder can read, or the vectors cannot be read or do not fit.
    """
    if config.embeddings is not None and vocabulary.tokenizer != "words":
        raise CapstanError(
            f"embeddings: {config.embeddings} has vectors of words, and the vocabulary holds pieces "
            f"({vocabulary.tokenizer}): set embeddings to null, or prepare.tokenizer to words"
        )
    decoder = build_decoder(config)
    longest = vocabulary.max_length + 1  # bos
    if decoder.max_steps is not None and decoder.max_steps < longest:
        raise CapstanError(
            f"captions of up to {vocabulary.max_length} {vocabulary.unit} need num_positions of {longest} or more, not "
            f"{decoder.max_steps}: raise it in decoder_settings, or lower prepare.max_length_percentile"
        )
    if config.embeddings is not None:
        assert isinstance(decoder, RecurrentDecoder)
        num_found = start_embedding(decoder.embedding, config.embeddings, vocabulary.words)
        print(f"word vectors: {num_found} of {len(vocabulary) - len(SPECIAL)} words in {config.embeddings}", flush=True)
    return decoder


__all__ = ["DECODERS", "Decoder", "DecoderConfig", "build_decoder", "check_decoder", "start_decoder"]
