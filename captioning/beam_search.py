"""Batched beam search over any decoder; greedy search is beam 1.

What is searched: sequences of words that end with eos, or are cut at `max_length` words. A sequence's score is the sum
of its log-probabilities divided by (its number of tokens, eos counted) ** `length_penalty`. At each step an image's
`num_beams` best extensions by summed log-probability, over beams × vocabulary, are kept; those that end are set aside.
An image is finished when `num_beams` sequences have ended, or no running one can still win, or at `max_length`; then it
leaves the batch. Sequences cut at `max_length` compete with the ended ones, so a model that never ends gives a caption.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captioning.decoders.base import Decoder, Memory, State
from captioning.vocabulary import SPECIAL, Vocabulary

NEVER = float("-inf")


@dataclass(frozen=True)
class Hypothesis:
    """The best sequence of an image."""

    token_ids: list[int]
    """Words, and eos if the model ended the caption itself."""
    score: float
    attention_weights: Tensor
    """(len(token_ids), num_regions) float32 on CPU: where the model looked for each token."""


@dataclass
class _Beams:
    """The running images, all tensors with one row an image."""

    image: Tensor  # (images,) place in the batch
    memory: Memory
    state: State  # of each beam
    scores: Tensor  # (images, beams) summed log-probabilities
    tokens: Tensor  # (images, beams, steps so far)
    attention: Tensor  # (images, beams, steps so far, num_regions)
    num_ended: Tensor  # (images,)
    best: Tensor  # (images,) normalised score of the best ended sequence

    def pick_images(self, rows: Tensor) -> _Beams:
        """Only these images go on."""
        return _Beams(
            self.image[rows],
            Memory(*(part[rows] for part in self.memory)),
            tuple(part[rows] for part in self.state),
            *(part[rows] for part in (self.scores, self.tokens, self.attention, self.num_ended, self.best)),
        )


@torch.inference_mode()
def beam_search(
    decoder: Decoder,
    features: Tensor,
    num_beams: int,
    max_length: int,
    length_penalty: float = 1.0,
    no_repeat_trigram: bool = False,
    min_length: int = 0,
) -> list[Hypothesis]:
    """Captions a batch of images.

    Args:
        decoder: in evaluation mode.
        features: (images, num_regions, encoder_dim).
        num_beams: at least 1; wider than the space of sequences makes the search exhaustive.
        max_length: tokens at most (words, or pieces of words).
        length_penalty: see above; 0 compares plain sums, larger values favour longer captions.
        no_repeat_trigram: no three tokens in a row occur twice in a caption.
        min_length: tokens at least; eos is banned before them.

    Returns:
        One hypothesis an image, in the order of `features`.
    """
    if num_beams < 1 or max_length < 1:
        raise ValueError(f"num_beams ({num_beams}) and max_length ({max_length}) are at least 1")
    if min_length > max_length:
        raise ValueError(f"min_length ({min_length}) is above max_length ({max_length})")
    results: list[Hypothesis | None] = [None] * len(features)
    beams = _start(decoder, features)
    last = torch.full_like(beams.image, Vocabulary.bos_id)[:, None]
    for length in range(1, max_length + 1):
        step = decoder.step(beams.memory, beams.state, last)
        logits = step.logits.to(torch.promote_types(step.logits.dtype, torch.float32))
        log_probs = _mask(logits.log_softmax(-1), beams.tokens, no_repeat_trigram, length <= min_length)
        beams.state = step.state
        _extend(beams, log_probs, step.attention_weights.float(), num_beams, length**length_penalty, results)
        finished = _finished(beams, num_beams, length, max_length, length_penalty)
        if length == max_length:
            _keep_best(beams, beams.scores / length**length_penalty, beams.tokens, beams.attention, results)
        if bool(finished.all()):
            break
        if bool(finished.any()):
            beams = beams.pick_images((~finished).nonzero().squeeze(1))
        last = beams.tokens[:, :, -1]
    return [result for result in results if result is not None]


def _start(decoder: Decoder, features: Tensor) -> _Beams:
    memory, state = decoder.remember(features)
    images, device = len(features), features.device
    return _Beams(
        image=torch.arange(images, device=device),
        memory=memory,
        state=state,
        scores=torch.zeros(images, 1, device=device),
        tokens=torch.empty(images, 1, 0, dtype=torch.long, device=device),
        attention=torch.empty(images, 1, 0, memory.regions.shape[1], device=device),
        num_ended=torch.zeros(images, dtype=torch.long, device=device),
        best=torch.full((images,), NEVER, device=device),
    )


def _mask(log_probs: Tensor, tokens: Tensor, no_repeat_trigram: bool, must_go_on: bool) -> Tensor:
    """Bans what is no word: (images, beams, vocabulary_size); words that would repeat a trigram; an end too early."""
    log_probs[..., [Vocabulary.pad_id, Vocabulary.bos_id, Vocabulary.unk_id]] = NEVER
    if no_repeat_trigram and tokens.shape[2] >= 3:
        pairs = tokens.unfold(2, 2, 1)[:, :, :-1]  # (images, beams, steps - 2, 2): all but the last pair
        repeated = (pairs == tokens[:, :, None, -2:]).all(-1)
        banned = torch.zeros_like(log_probs).scatter_add_(2, tokens[:, :, 2:], repeated.to(log_probs.dtype))
        log_probs = log_probs.masked_fill(banned > 0, NEVER)
    if must_go_on:
        words_left = (log_probs[..., len(SPECIAL) :] > NEVER).any(-1)  # else nothing could be said at all
        log_probs[..., Vocabulary.eos_id] = log_probs[..., Vocabulary.eos_id].masked_fill(words_left, NEVER)
    return log_probs


def _extend(
    beams: _Beams,
    log_probs: Tensor,
    attention: Tensor,
    num_beams: int,
    divisor: float,
    results: list[Hypothesis | None],
) -> None:
    """One word further for every beam, in place; sequences that end go to `results` if they are their image's best."""
    images, width, vocabulary_size = log_probs.shape
    totals = (beams.scores[:, :, None] + log_probs).flatten(1)
    # Among twice as many extensions at least num_beams do not end: each beam has one way to end.
    scores, places = totals.topk(min(2 * num_beams, totals.shape[1]))  # (images, candidates), falling
    parents, words = places // vocabulary_size, places % vocabulary_size
    tokens = torch.cat([_pick(beams.tokens, parents), words[..., None]], 2)
    seen = torch.cat([_pick(beams.attention, parents), _pick(attention, parents)[:, :, None]], 2)
    ends = (words == Vocabulary.eos_id) & (scores > NEVER)
    ranked = torch.arange(ends.shape[1], device=ends.device) < num_beams
    ended = scores.masked_fill(~(ends & ranked), NEVER)
    beams.num_ended = beams.num_ended + (ended > NEVER).sum(1)
    _keep_best(beams, ended / divisor, tokens, seen, results)
    # The first num_beams that go on, in falling order: a stable sort puts the ended behind.
    running = (words == Vocabulary.eos_id).to(torch.uint8).argsort(dim=1, stable=True)[:, :num_beams]
    beams.scores = scores.masked_fill(words == Vocabulary.eos_id, NEVER).gather(1, running)
    beams.tokens, beams.attention = _pick(tokens, running), _pick(seen, running)
    beams.state = tuple(_pick(part, parents.gather(1, running)) for part in beams.state)


def _pick(values: Tensor, beams: Tensor) -> Tensor:
    """values (images, beams, …) at beams (images, picked) → (images, picked, …)."""
    rows = torch.arange(len(values), device=values.device)[:, None]
    return values[rows, beams]


def _keep_best(
    beams: _Beams, scores: Tensor, tokens: Tensor, attention: Tensor, results: list[Hypothesis | None]
) -> None:
    """Takes each image's best of `scores` (images, candidates) where it beats what the image has."""
    score, place = scores.max(1)
    better = (score > beams.best).nonzero().squeeze(1)
    beams.best = torch.maximum(beams.best, score)
    if not len(better):
        return
    place = place[better]
    chosen = zip(
        beams.image[better].tolist(),
        tokens[better, place].tolist(),
        score[better].tolist(),
        attention[better, place].cpu(),
        strict=True,
    )
    for image, token_ids, value, weights in chosen:
        results[image] = Hypothesis(token_ids, value, weights)


def _finished(beams: _Beams, num_beams: int, length: int, max_length: int, length_penalty: float) -> Tensor:
    """Which images are done: (images,) bool."""
    # Log-probabilities only fall, so a running sequence's score is at most its sum over the kindest divisor ahead.
    kindest = max_length if length_penalty > 0 else length + 1
    bound = beams.scores[:, 0] / kindest**length_penalty
    return (beams.num_ended >= num_beams) | (beams.best >= bound) | torch.tensor(length == max_length)
