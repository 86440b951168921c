"""Captions for many images: beam search over a feature store, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from captioning.beam_search import Hypothesis, beam_search
from captioning.datasets import FeatureStore
from captioning.decoders import Decoder
from captioning.progress import Progress


def search_store(
    decoder: Decoder,
    store: FeatureStore,
    device: torch.device,
    batch_size: int,
    num_beams: int,
    max_length: int,
    length_penalty: float = 1.0,
    no_repeat_trigram: bool = False,
    progress: Progress | None = None,
) -> Iterator[Hypothesis]:
    """Beam search over all images of a store, batch by batch, in the store's order."""
    decoder.eval()
    for start in range(0, len(store), batch_size):
        indices = range(start, min(start + batch_size, len(store)))
        features = store.gather(indices).to(device)
        yield from beam_search(decoder, features, num_beams, max_length, length_penalty, no_repeat_trigram)
        if progress:
            progress.update(len(indices))
