"""Search that may not end too early, against the plain definition: eos banned before `min_length` words."""

from __future__ import annotations

import pytest
import torch
from conftest import small_decoder
from test_beam_search import EOS, next_log_probs

from captioning.beam_search import beam_search


def plain(decoder, image, num_beams: int, min_length: int, max_length: int) -> list[int]:
    """One image's search with lists; the mean log-probability decides."""
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for length in range(1, max_length + 1):
        extensions = []
        for total, words in running:
            log_probs = next_log_probs(decoder, image, words)
            if len(words) < min_length:
                log_probs[EOS] = float("-inf")
            extensions += [(total + p, [*words, t]) for t, p in enumerate(log_probs.tolist()) if p > float("-inf")]
        extensions.sort(key=lambda item: -item[0])
        ended += [(total / length, tokens) for total, tokens in extensions[:num_beams] if tokens[-1] == EOS]
        running = [item for item in extensions if item[1][-1] != EOS][:num_beams]
        if len(ended) >= num_beams:
            break
    if length == max_length:
        ended += [(total / max_length, tokens) for total, tokens in running]
    return max(ended, key=lambda item: item[0])[1]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("min_length", [0, 1, 3, 6])
def test_the_search_is_the_best_of_what_is_long_enough(num_beams, min_length, features) -> None:
    decoder = small_decoder(seed=4)
    with torch.no_grad():
        decoder.output.bias[EOS] += 6.0  # it ends as soon as it may
    found = beam_search(decoder, features, num_beams, 6, min_length=min_length)
    lengths = [len([t for t in hypothesis.token_ids if t != EOS]) for hypothesis in found]
    assert min(lengths) >= min_length and (min_length == 6 or min(lengths) < 6)
    for image, hypothesis in zip(features, found, strict=True):
        assert hypothesis.token_ids == plain(decoder, image, num_beams, min_length, 6)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_where_no_word_is_left_the_caption_ends_all_the_same(num_beams, features) -> None:
    """With one word in the vocabulary, its trigram can be said once: three words, and then nothing but the end."""
    found = beam_search(small_decoder(vocabulary_size=5), features, num_beams, 9, 1.0, True, min_length=9)
    assert [hypothesis.token_ids for hypothesis in found] == [[4, 4, 4, EOS]] * len(features)


def test_a_minimum_above_the_maximum_is_refused(features) -> None:
    with pytest.raises(ValueError, match=r"min_length \(6\) is above max_length \(5\)"):
        beam_search(small_decoder(), features, 2, 5, min_length=6)
