"""Validation during training: loss under teacher forcing, and CIDEr-D of free-running greedy captions, without Java."""

from __future__ import annotations

import json

import torch
from torch.nn import functional

from captioning.datasets import CaptionBatches, FeatureStore
from captioning.decoders import Decoder
from captioning.distributed import ALONE, World
from captioning.generation import search_store
from captioning.metrics.cider import CiderD
from captioning.metrics.words import simple_tokenize
from captioning.vocabulary import Vocabulary


@torch.inference_mode()
def evaluate_loss(decoder: Decoder, batches: CaptionBatches, device: torch.device, world: World = ALONE) -> float:
    """Mean cross entropy a token (nats) over the split, without label smoothing; the ranks share the images."""
    decoder.eval()
    total, num_tokens = 0.0, 0
    for share in batches.epoch(world=world):
        num_tokens += share.num_tokens
        if share.batch is not None:
            batch = share.batch.to(device)
            logits = decoder(batch).float()
            total += functional.cross_entropy(logits, batch.packed_targets, reduction="sum").item()
    return world.sum_numbers([total])[0] / num_tokens


class GreedyCider:
    """CIDEr-D of greedy captions against a split's references, whose n-grams are counted once."""

    def __init__(self, store: FeatureStore, references: list[list[str]], vocabulary: Vocabulary, size: int) -> None:
        self.store, self.vocabulary, self.size = store, vocabulary, size
        self.metric = CiderD([[simple_tokenize(caption) for caption in captions] for captions in references])

    def __call__(self, decoder: Decoder, device: torch.device, world: World = ALONE) -> float:
        """Scale as pycocoevalcap's, so 1.0 is a good captioner. Each rank captions its images; all score all."""
        images = world.part(len(self.store))
        found = search_store(decoder, self.store, device, images, self.size, 1, self.vocabulary.max_length)
        mine = [self.vocabulary.decode(hypothesis.token_ids) for hypothesis in found]
        captions = [""] * len(self.store)
        for rank, part in enumerate(world.gather(json.dumps(mine).encode())):
            captions[rank :: world.num_processes] = json.loads(part)
        return float(self.metric.score([simple_tokenize(caption) for caption in captions])[0])
