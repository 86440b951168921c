"""Scheduled sampling for any decoder: words that the model draws itself take the place of some of the caption's.

Bengio et al. 2015 draw them on the way, word by word. Here they come from a first pass over the whole captions, without
gradients (Mihaylova & Martins 2019; Duckworth et al. 2019 with one pass): both passes stay as fast as plain training,
and it works for decoders that read all words at once. A drawn word has seen the caption's words before it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from captioning.datasets import Batch
from captioning.decoders import Decoder
from captioning.drawing import draw_words
from captioning.vocabulary import Vocabulary

NEVER_READ = [Vocabulary.pad_id, Vocabulary.bos_id, Vocabulary.eos_id, Vocabulary.unk_id]
"""What search never gives a decoder to read after the first word."""


def mix_in_own_words(decoder: Decoder, batch: Batch, probability: float) -> Batch:
    """The batch with each word of its inputs replaced, with this probability, by one that the decoder draws from its
    distribution at that place, as it is now (dropout included). Targets stay. Draws from torch's generator, and nothing
    at probability 0.
    """
    if probability == 0:
        return batch
    with torch.no_grad():
        drawn = draw_words(decoder(batch), NEVER_READ)
    own = torch.full_like(batch.targets, Vocabulary.pad_id)
    own.view(-1)[batch.places] = drawn  # (images, captions, steps): what follows each input
    after_first = batch.inputs[..., 1:]
    chosen = torch.rand(after_first.shape, device=after_first.device) < probability
    chosen &= after_first != Vocabulary.pad_id
    mixed = torch.where(chosen, own[..., :-1], after_first)
    return replace(batch, inputs=torch.cat([batch.inputs[..., :1], mixed], -1))
