"""The captioning decoder of the common PyTorch tutorials, on our weights: same sums, the usual order of work.

The image is repeated and projected for each of its captions, attention projects the regions again at every step, an
LSTMCell steps through padded captions, and the vocabulary's logits are made inside the loop. Search takes one image at
a time and, as the tutorials' evaluation scripts do, once for each reference caption.
"""

from __future__ import annotations

import torch
from torch import Tensor

from captioning.datasets import Batch
from captioning.decoders.attend_first import AttendFirst
from captioning.vocabulary import Vocabulary


def _cell(decoder: AttendFirst, word: Tensor, hidden: Tensor, cell: Tensor, regions: Tensor) -> tuple[Tensor, ...]:
    """One step for (captions, …) with regions (captions, num_regions, region_dim): logits, hidden, cell."""
    attention = decoder.attention
    scores = attention.score((attention.key(regions) + attention.query(hidden)[:, None]).tanh()).squeeze(-1)
    context = (scores.softmax(-1)[..., None] * regions).sum(1)
    context = context * decoder.context_gate(hidden).sigmoid()
    gates = decoder.word_gates(word) + decoder.context_gates(context) + decoder.hidden_gates(hidden)
    write, keep, show, new = gates.chunk(4, -1)
    cell = keep.sigmoid() * cell + write.sigmoid() * new.tanh()
    hidden = show.sigmoid() * cell.tanh()
    return decoder.output(decoder.combine(hidden, context)), hidden, cell


def _start(decoder: AttendFirst, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    regions = decoder.project(features).relu() if decoder.project is not None else features
    hidden, cell = decoder.initial(regions.mean(1)).tanh().chunk(2, -1)
    return regions, hidden, cell


def tutorial_loss(decoder: AttendFirst, batch: Batch) -> Tensor:
    """Mean cross entropy a token, as `training` computes it without label smoothing."""
    captions = [(i, words, targets) for i, group in enumerate(zip(batch.inputs, batch.targets, strict=True))
                for words, targets in zip(*group, strict=True) if (targets != Vocabulary.pad_id).any()]  # fmt: skip
    captions.sort(key=lambda item: -int((item[2] != Vocabulary.pad_id).sum()))
    images = torch.tensor([i for i, _, _ in captions])
    words, targets = torch.stack([w for _, w, _ in captions]), torch.stack([t for _, _, t in captions])
    lengths = (targets != Vocabulary.pad_id).sum(1)
    regions, hidden, cell = _start(decoder, batch.features[images])
    embedded = decoder.embedding(words)
    logits = torch.zeros(len(words), int(lengths.max()), decoder.config.vocabulary_size)
    for step in range(int(lengths.max())):
        running = int((lengths > step).sum())
        scored, hidden, cell = _cell(
            decoder, embedded[:running, step], hidden[:running], cell[:running], regions[:running]
        )
        logits[:running, step] = scored
    mask = targets[:, : logits.shape[1]] != Vocabulary.pad_id
    return torch.nn.functional.cross_entropy(logits[mask], targets[:, : logits.shape[1]][mask])


@torch.inference_mode()
def tutorial_beam_search(decoder: AttendFirst, features: Tensor, num_beams: int, max_length: int) -> list[list[int]]:
    """Beam search for one image at a time (images, num_regions, encoder_dim); scores as `beam_search` does."""
    return [_search_one(decoder, image[None], num_beams, max_length) for image in features]


def _search_one(decoder: AttendFirst, features: Tensor, num_beams: int, max_length: int) -> list[int]:
    regions, hidden, cell = _start(decoder, features)
    running, totals, ended = [[Vocabulary.bos_id]], torch.zeros(1, 1), []
    for length in range(1, max_length + 1):
        words = decoder.embedding(torch.tensor([sequence[-1] for sequence in running]))
        logits, hidden, cell = _cell(decoder, words, hidden, cell, regions.expand(len(running), -1, -1))
        log_probs = logits.log_softmax(-1)
        log_probs[:, [Vocabulary.pad_id, Vocabulary.bos_id, Vocabulary.unk_id]] = float("-inf")
        scores, places = (totals + log_probs).view(-1).sort(descending=True)  # the whole vocabulary, as they do
        kept: list[tuple[list[int], int, float]] = []
        for rank, (score, place) in enumerate(zip(scores[: 2 * num_beams].tolist(), places.tolist(), strict=False)):
            parent, word = divmod(place, log_probs.shape[1])
            if word != Vocabulary.eos_id:
                kept.append(([*running[parent], word], parent, score))
            elif rank < num_beams:
                ended.append((score / length, [*running[parent][1:], word]))
        kept = kept[:num_beams]
        running = [sequence for sequence, _, _ in kept]
        totals = log_probs.new_tensor([[score] for _, _, score in kept])
        parents = [parent for _, parent, _ in kept]
        hidden, cell = hidden[parents], cell[parents]
        if len(ended) >= num_beams:
            break
    else:
        ended += [(float(total) / max_length, sequence[1:]) for total, sequence in zip(totals, running, strict=True)]
    return max(ended, key=lambda item: item[0])[1]
