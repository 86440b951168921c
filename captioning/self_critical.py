"""Self-critical training: captions that the model draws itself are scored, and those better than its others become
likelier.

Rennie et al. 2017 ("Self-critical Sequence Training for Image Captioning", section 3.3): the gradient of the expected
score by REINFORCE, with a baseline that the model itself sets. Here that is the mean of an image's other samples (Luo
2020, "A Better Variant of Self-Critical Sequence Training"), which needs no greedy caption. The score is CIDEr-D over
tokens, with the train split's document frequencies, where the end of a caption is a word: else captions that stop in
the middle ("a dog on a") would pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from captioning.datasets import Batch, collate
from captioning.decoders import Decoder
from captioning.decoders.base import Memory
from captioning.distributed import World
from captioning.drawing import ban, draw_words
from captioning.metrics.cider import Consensus, Rarity, count_ngrams
from captioning.train_params import SelfCriticalTraining
from captioning.vocabulary import Vocabulary

NEVER_SAID = [Vocabulary.pad_id, Vocabulary.bos_id, Vocabulary.unk_id]

Drawn = list[list[list[int]]]
"""Per image, per sample its tokens, eos counted where the caption ended by itself."""


@dataclass
class Rewards:
    """CIDEr-D of drawn captions, summed over batches."""

    total: float = 0.0
    number: int = 0

    def add(self, scores: Tensor) -> None:
        self.total += float(scores.sum())
        self.number += scores.numel()

    def mean(self, world: World) -> float:
        """Over all ranks' captions."""
        total, number = world.sum_numbers([self.total, self.number])
        return total / max(1.0, number)


class SelfCritical:
    """The loss of captions that a decoder draws."""

    def __init__(
        self, captions: Sequence[Sequence[Sequence[int]]], settings: SelfCriticalTraining, max_length: int
    ) -> None:
        """
        Args:
            captions: the train split's, per image, as word ids.
            max_length: of a drawn caption, in words.
        """
        self.captions, self.settings, self.max_length = captions, settings, max_length

    @cached_property
    def rarity(self) -> Rarity:
        """Of n-grams of tokens; counted when first asked for, in seconds for 30,000 captions."""
        return Rarity([count_ngrams([*words, Vocabulary.eos_id]) for words in group] for group in self.captions)

    def loss_sum(self, decoder: Decoder, batch: Batch, rewards: Rewards) -> Tensor:
        """−Σ (score − mean score of the image's other samples) · log P(token), over all tokens drawn for the batch's
        images, as if an image had as many samples as it has captions: so `num_samples` does not decide the weight
        against cross entropy. `rewards` gets the scores.

        Without dropout its gradient is an unbiased estimate of that of −Σ score. With dropout it is near one: captions
        are drawn without it, as in search, and the gradient is taken with it, as in training.
        """
        decoder.eval()
        drawn = draw_captions(decoder, batch.features, self.settings.num_samples, self.max_length)
        decoder.train()
        scores = self.score(batch, drawn)
        rewards.add(scores)
        num_captions = (batch.targets[..., 0] != Vocabulary.pad_id).sum(1, keepdim=True).cpu()
        weights = advantages(scores) * (num_captions / self.settings.num_samples)
        return policy_loss(decoder, batch.features, drawn, weights)

    def score(self, batch: Batch, drawn: Drawn) -> Tensor:
        """CIDEr-D of each sample against its image's captions in the batch: (images, num_samples) float64."""
        references = [
            [words for caption in image if (words := [token for token in caption if token != Vocabulary.pad_id])]
            for image in batch.targets.tolist()
        ]
        judges = [Consensus(captions, self.rarity) for captions in references]
        scores = [[judge.score(tokens) for tokens in samples] for judge, samples in zip(judges, drawn, strict=True)]
        return torch.tensor(scores, dtype=torch.float64)


def advantages(scores: Tensor) -> Tensor:
    """How much better each sample is than the mean of its image's others: (images, num_samples)."""
    num_samples = scores.shape[1]
    return (scores - scores.mean(1, keepdim=True)) * (num_samples / (num_samples - 1))


@torch.no_grad()
def draw_captions(decoder: Decoder, features: Tensor, num_samples: int, max_length: int) -> Drawn:
    """Draws captions word by word from the decoder's distribution, with torch's generator.

    Args:
        features: (images, num_regions, encoder_dim).
        max_length: words at most; what has not ended by then is cut.
    """
    memory, state = decoder.remember(features)
    state = tuple(part.repeat_interleave(num_samples, 1) for part in state)
    image = torch.arange(len(features), device=features.device)
    last = torch.full((len(features), num_samples), Vocabulary.bos_id, device=features.device)
    running = torch.ones_like(last, dtype=torch.bool)
    found = torch.full((*last.shape, max_length), Vocabulary.pad_id, device=features.device)
    for length in range(max_length):
        step = decoder.step(memory, state, last)
        last = draw_words(step.logits.flatten(0, 1), NEVER_SAID).view_as(last)
        last = last.masked_fill(~running, Vocabulary.pad_id)
        found[image, :, length] = last
        running, state = running & (last != Vocabulary.eos_id), step.state
        going = running.any(1)
        if not bool(going.all()):  # an image whose samples have all ended leaves the batch
            image, last, running = image[going], last[going], running[going]
            memory, state = Memory(*(part[going] for part in memory)), tuple(part[going] for part in state)
        if not len(image):
            break
    pad_id = Vocabulary.pad_id
    return [[[token for token in tokens if token != pad_id] for tokens in samples] for samples in found.tolist()]


def policy_loss(decoder: Decoder, features: Tensor, drawn: Drawn, advantages: Tensor) -> Tensor:
    """−Σ advantage · log P(token) over all tokens drawn, the end of a caption that was cut excepted: it was not drawn.

    Args:
        advantages: (images, num_samples).
    """
    groups = [list(zip(samples, found, strict=True)) for samples, found in zip(drawn, advantages.tolist(), strict=True)]
    groups = [sorted(group, key=lambda sample: -len(_words(sample[0]))) for group in groups]
    order = sorted(range(len(groups)), key=lambda i: -len(_words(groups[i][0][0])))
    groups = [groups[i] for i in order]  # as `collate` sorts, which then changes nothing
    words = [[_words(tokens) for tokens, _ in group] for group in groups]
    batch = collate(torch.empty(len(groups), 0), words, Vocabulary).to(features.device)
    batch = replace(batch, features=features[torch.tensor(order, device=features.device)])
    weights = torch.tensor([[advantage for _, advantage in group] for group in groups], dtype=torch.float32)
    was_cut = torch.tensor([[tokens[-1:] != [Vocabulary.eos_id] for tokens, _ in group] for group in groups])
    caption = batch.places // batch.targets.shape[-1]
    of_token = weights.to(features.device).view(-1)[caption]
    is_made_up = was_cut.to(features.device).view(-1)[caption] & (batch.packed_targets == Vocabulary.eos_id)
    logits = decoder(batch)
    with torch.autocast(logits.device.type, enabled=False):
        surprise = functional.cross_entropy(ban(logits, NEVER_SAID), batch.packed_targets, reduction="none")
    return (surprise * of_token.masked_fill(is_made_up, 0.0)).sum()


def _words(tokens: list[int]) -> list[int]:
    return tokens[:-1] if tokens[-1:] == [Vocabulary.eos_id] else tokens
