"""Validation during training: loss under teacher forcing, and CIDEr-D of free-running greedy captions, without Java."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from captioning.datasets import CaptionBatches, FeatureStore, pieces
from captioning.decoders import Decoder
from captioning.distributed import ALONE, World
from captioning.generation import search_store
from captioning.memory import Fitting
from captioning.metrics.cider import CiderD
from captioning.metrics.words import simple_tokenize
from captioning.vocabulary import Vocabulary

MAX_EXPONENT = 700
"""Above it, a perplexity is no float64."""


@dataclass
class Tally:
    """How well a decoder foresees target tokens under teacher forcing, summed over batches."""

    loss_sum: float = 0.0
    """Cross entropy, nats, without label smoothing."""
    num_correct: int = 0
    """Tokens whose target has the highest probability."""
    num_tokens: int = 0

    @torch.no_grad()
    def add(self, logits: Tensor, targets: Tensor) -> None:
        """(num_tokens, vocabulary_size) float32 and (num_tokens,)."""
        self.loss_sum += functional.cross_entropy(logits, targets, reduction="sum").item()
        self.num_correct += int((logits.argmax(-1) == targets).sum())
        self.num_tokens += len(targets)

    def over(self, world: World) -> Tally:
        """All ranks' together."""
        loss_sum, num_correct, num_tokens = world.sum_numbers([self.loss_sum, self.num_correct, self.num_tokens])
        return Tally(loss_sum, int(num_correct), int(num_tokens))

    @property
    def loss(self) -> float:
        """Mean a token."""
        return self.loss_sum / self.num_tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < MAX_EXPONENT else math.inf

    @property
    def accuracy(self) -> float:
        """Share of tokens in [0, 1]."""
        return self.num_correct / self.num_tokens


def foresee(
    decoder: Decoder,
    batches: CaptionBatches,
    device: torch.device,
    world: World = ALONE,
    fitting: Fitting | None = None,
) -> Tally:
    """Teacher forcing over the split; the ranks share the images.

    Args:
        fitting: how many images at once fit into memory. Where they do not, all is done again with half as many: so
            the last digits depend on where it ends, and not on the batch that did not fit.
    """
    most = -(-batches.size // world.num_processes)
    fitting = fitting or Fitting(most, device)
    return fitting.run(lambda parts: _foresee_mine(decoder, batches, device, world, parts), most).over(world)


@torch.inference_mode()
def _foresee_mine(
    decoder: Decoder, batches: CaptionBatches, device: torch.device, world: World, parts: list[slice]
) -> Tally:
    decoder.eval()
    tally = Tally()
    for share in batches.epoch(world=world):
        for piece in pieces(share, parts):
            if piece.batch is not None:
                batch = piece.batch.to(device)
                tally.add(decoder(batch).float(), batch.packed_targets)
    return tally


class GreedyCider:
    """CIDEr-D of greedy captions against a split's references, whose n-grams are counted once."""

    def __init__(self, store: FeatureStore, references: list[list[str]], vocabulary: Vocabulary, size: int) -> None:
        self.store, self.vocabulary, self.size = store, vocabulary, size
        self.references = references
        self.captions: list[str] = []
        """What the last call found, an image each."""
        self.metric = CiderD([[simple_tokenize(caption) for caption in captions] for captions in references])

    def __call__(
        self,
        decoder: Decoder,
        device: torch.device,
        world: World = ALONE,
        min_length: int = 0,
        fitting: Fitting | None = None,
    ) -> float:
        """Scale as pycocoevalcap's, so 1.0 is a good captioner. Each rank captions its images; all score all.

        Args:
            min_length: tokens at least; at most the vocabulary's `max_length` counts.
            fitting: as in `foresee`.
        """
        images, longest = world.part(len(self.store)), self.vocabulary.max_length
        least = min(min_length, longest)

        def caption(parts: list[slice]) -> list[str]:
            found = search_store(decoder, self.store, device, images, parts[0].stop, 1, longest, min_length=least)
            return [self.vocabulary.decode(hypothesis.token_ids) for hypothesis in found]

        mine = (fitting or Fitting(self.size, device)).run(caption, max(1, min(self.size, len(images))))
        captions = [""] * len(self.store)
        for rank, part in enumerate(world.gather(json.dumps(mine).encode())):
            captions[rank :: world.num_processes] = json.loads(part)
        self.captions = captions
        return float(self.metric.score([simple_tokenize(caption) for caption in captions])[0])
