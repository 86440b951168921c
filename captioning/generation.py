"""Captions for many images: beam search over a feature store, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from captioning.beam_search import Hypothesis, beam_search
from captioning.datasets import FeatureStore
from captioning.decoders import Decoder
from captioning.progress import Progress


def search_store(
    decoder: Decoder,
    store: FeatureStore,
    device: torch.device,
    images: Sequence[int],
    batch_size: int,
    num_beams: int,
    max_length: int,
    length_penalty: float = 1.0,
    no_repeat_trigram: bool = False,
    min_length: int = 0,
    progress: Progress | None = None,
) -> Iterator[Hypothesis]:
    """Beam search over images of a store, named by their positions, batch by batch, in that order."""
    decoder.eval()
    for start in range(0, len(images), batch_size):
        indices = images[start : start + batch_size]
        features = store.gather(indices).to(device)
        yield from beam_search(decoder, features, num_beams, max_length, length_penalty, no_repeat_trigram, min_length)
        if progress:
            progress.update(len(indices))
