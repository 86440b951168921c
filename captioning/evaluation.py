"""Validation during training: loss under teacher forcing, and CIDEr-D of free-running greedy captions, without Java."""

from __future__ import annotations

import torch
from torch.nn import functional

from captioning.datasets import CaptionBatches, FeatureStore
from captioning.decoders import Decoder
from captioning.generation import search_store
from captioning.metrics.cider import CiderD
from captioning.metrics.words import simple_tokenize
from captioning.vocabulary import Vocabulary


@torch.inference_mode()
def evaluate_loss(decoder: Decoder, batches: CaptionBatches, device: torch.device) -> float:
    """Mean cross entropy a token (nats) over the split, without label smoothing."""
    decoder.eval()
    total, num_tokens = 0.0, 0
    for batch in batches.epoch():
        batch = batch.to(device)
        logits = decoder(batch).float()
        total += functional.cross_entropy(logits, batch.packed_targets, reduction="sum").item()
        num_tokens += batch.num_tokens
    return total / num_tokens


class GreedyCider:
    """CIDEr-D of greedy captions against a split's references, whose n-grams are counted once."""

    def __init__(self, store: FeatureStore, references: list[list[str]], vocabulary: Vocabulary, size: int) -> None:
        self.store, self.vocabulary, self.size = store, vocabulary, size
        self.metric = CiderD([[simple_tokenize(caption) for caption in captions] for captions in references])

    def __call__(self, decoder: Decoder, device: torch.device) -> float:
        """Scale as pycocoevalcap's, so 1.0 is a good captioner."""
        found = search_store(decoder, self.store, device, self.size, 1, self.vocabulary.max_length)
        captions = [self.vocabulary.decode(hypothesis.token_ids) for hypothesis in found]
        return float(self.metric.score([simple_tokenize(caption) for caption in captions])[0])
