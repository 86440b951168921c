"""The batched search against an exhaustive one and against a plain search of one image at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import VARIANTS, small_decoder

from captioning.beam_search import beam_search
from captioning.decoders import Decoder
from captioning.vocabulary import Vocabulary

EOS = Vocabulary.eos_id


def next_log_probs(decoder: Decoder, image: torch.Tensor, words: list[int]) -> torch.Tensor:
    """Log-probabilities of the token after `words`, from scratch: slow and plain."""
    memory, state = decoder.remember(image[None])
    for word in [Vocabulary.bos_id, *words]:
        step = decoder.step(memory, state, torch.tensor([[word]]))
        state = step.state
    log_probs = step.logits[0, 0].log_softmax(-1)
    log_probs[[Vocabulary.pad_id, Vocabulary.bos_id, Vocabulary.unk_id]] = float("-inf")
    return log_probs


def repeats_trigram(words: list[int]) -> bool:
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(trigrams)) < len(trigrams)


def exhaustive(decoder, image, vocabulary_size, max_length, penalty) -> tuple[list[int], float]:
    """Scores every sequence of words that ends with eos, or is cut at max_length words."""
    best: tuple[list[int], float] = ([], float("-inf"))
    words = range(4, vocabulary_size)
    for length in range(max_length + 1):
        for sequence in itertools.product(words, repeat=length):
            tokens = list(sequence) if length == max_length else [*sequence, EOS]
            total = sum(next_log_probs(decoder, image, tokens[:i])[t].item() for i, t in enumerate(tokens))
            if total / len(tokens) ** penalty > best[1]:
                best = (tokens, total / len(tokens) ** penalty)
    return best


def plain(decoder, image, num_beams, max_length, penalty, no_repeat_trigram) -> tuple[list[int], float]:
    """The search's definition for one image, with lists and sorting, and no early exit but num_beams ended."""
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for length in range(1, max_length + 1):
        extensions = []
        for total, words in running:
            for token, log_prob in enumerate(next_log_probs(decoder, image, words).tolist()):
                if log_prob > float("-inf") and not (no_repeat_trigram and repeats_trigram([*words, token])):
                    extensions.append((total + log_prob, [*words, token]))
        extensions.sort(key=lambda item: -item[0])
        for total, tokens in extensions[:num_beams]:
            if tokens[-1] == EOS:
                ended.append((total / length**penalty, tokens))
        running = [item for item in extensions if item[1][-1] != EOS][:num_beams]
        if len(ended) >= num_beams:
            break
    if length == max_length:
        ended += [(total / max_length**penalty, tokens) for total, tokens in running]
    score, tokens = max(ended, key=lambda item: item[0])
    return tokens, score


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("variant", ["lstm-bahdanau", "gru-luong_general", "lstm-none-zeros", "transformer-learned"])
def test_a_beam_as_wide_as_the_space_is_exhaustive(variant, penalty, features) -> None:
    decoder = small_decoder(variant, vocabulary_size=7, seed=3)
    found = beam_search(decoder, features, num_beams=4**4, max_length=4, length_penalty=penalty)
    for image, hypothesis in zip(features, found, strict=True):
        tokens, score = exhaustive(decoder, image, 7, 4, penalty)
        assert hypothesis.token_ids == tokens
        assert hypothesis.score == pytest.approx(score, rel=1e-5)


@pytest.mark.parametrize(
    ("variant", "num_beams"),
    [(v, 3) for v in VARIANTS]
    + [(v, beams) for v in ("lstm-bahdanau", "gru-luong_general", "transformer") for beams in (1, 2, 5, 11)],
)
def test_the_batch_equals_one_plain_search_an_image(variant, num_beams, features) -> None:
    for seed, penalty, no_repeat in [(0, 1.0, False), (1, 0.0, True), (2, 0.7, True), (3, -1.0, False)]:
        decoder = small_decoder(variant, seed=seed)
        with torch.no_grad():
            decoder.output.bias[EOS] += 1.0 - seed  # some models end early, some hardly ever
        found = beam_search(decoder, features, num_beams, 8, penalty, no_repeat)
        for image, hypothesis in zip(features, found, strict=True):
            tokens, score = plain(decoder, image, num_beams, 8, penalty, no_repeat)
            assert hypothesis.token_ids == tokens
            assert hypothesis.score == pytest.approx(score, rel=1e-5)


def test_greedy_takes_the_best_word_each_time(features) -> None:
    decoder = small_decoder()
    for image, hypothesis in zip(features, beam_search(decoder, features, 1, 6), strict=True):
        words: list[int] = []
        while len(words) < 6 and (not words or words[-1] != EOS):
            words.append(int(next_log_probs(decoder, image, words).argmax()))
        assert hypothesis.token_ids == words


@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_model_that_never_ends_gives_a_caption(num_beams, features) -> None:
    decoder = small_decoder()
    with torch.no_grad():
        decoder.output.bias[EOS] = -1e9
    for hypothesis in beam_search(decoder, features, num_beams, max_length=12):
        assert len(hypothesis.token_ids) == 12 and EOS not in hypothesis.token_ids


def test_a_model_that_ends_at_once_gives_an_empty_caption(features) -> None:
    decoder = small_decoder()
    with torch.no_grad():
        decoder.output.bias[EOS] = 1e3
    assert all(h.token_ids == [EOS] for h in beam_search(decoder, features, 3, 12))


def test_no_trigram_occurs_twice(features) -> None:
    decoder = small_decoder(vocabulary_size=6)  # two words: repetition is hard to avoid
    with torch.no_grad():
        decoder.output.bias[EOS] = -1e9
    free = beam_search(decoder, features, 3, 9)
    assert any(repeats_trigram(h.token_ids) for h in free)
    held = beam_search(decoder, features, 3, 9, no_repeat_trigram=True)
    assert not any(repeats_trigram(h.token_ids) for h in held)


@pytest.mark.parametrize("variant", ["gru-luong_general", "lstm-bahdanau-all", "transformer"])
def test_attention_follows_the_chosen_beam(variant, features) -> None:
    decoder = small_decoder(variant)
    for image, hypothesis in zip(features, beam_search(decoder, features, 4, 6), strict=True):
        memory, state = decoder.remember(image[None])
        for word, weights in zip(
            [Vocabulary.bos_id, *hypothesis.token_ids], hypothesis.attention_weights, strict=False
        ):
            step = decoder.step(memory, state, torch.tensor([[word]]))
            state = step.state
            torch.testing.assert_close(step.attention_weights[0, 0].float(), weights)


def test_impossible_settings() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        beam_search(small_decoder(), torch.zeros(1, 4, 6).double(), 0, 5)
