"""What is particular to the Transformer; what it shares with all decoders is in test_decoders.py."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import random_captions, small_decoder

from captioning.beam_search import beam_search
from captioning.datasets import collate
from captioning.decoders import start_decoder
from captioning.decoders.transformer import sinusoids
from captioning.errors import CapstanError
from captioning.vocabulary import SPECIAL, Vocabulary


def test_sinusoids_are_the_papers() -> None:
    found = sinusoids(3, 2, 6, torch.zeros((), dtype=torch.float64))
    for row, position in enumerate((3, 4)):
        for i in range(3):
            angle = position / 10000 ** (i / 3)
            assert found[row, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert found[row, 3 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_the_cache_grows_by_one_step(features) -> None:
    decoder = small_decoder("transformer")
    memory, state = decoder.remember(features)
    for length in range(1, 4):
        state = decoder.step(memory, state, torch.full((5, 1), 4)).state
        assert [part.shape for part in state] == [(5, 1, 2, 2, length, 4)] * 2  # keys and values of 2 heads; 2 layers


def test_it_is_torchs_decoder(features) -> None:
    """The same weights in torch's own pre-norm layers."""
    decoder = small_decoder("transformer", num_layers=1)
    layer = torch.nn.TransformerDecoderLayer(8, 2, 12, 0.0, batch_first=True, norm_first=True).double().eval()
    ours = decoder.layers[0]
    keys, values = decoder.region_keys.weight.chunk(2), decoder.region_keys.bias.chunk(2)
    with torch.no_grad():
        pairs = [
            (layer.self_attn.in_proj_weight, ours.self_inputs.weight),
            (layer.self_attn.in_proj_bias, ours.self_inputs.bias),
            (layer.multihead_attn.in_proj_weight, torch.cat([ours.cross_query.weight, *keys])),
            (layer.multihead_attn.in_proj_bias, torch.cat([ours.cross_query.bias, *values])),
        ]
        modules = [
            (layer.self_attn.out_proj, ours.self_output),
            (layer.multihead_attn.out_proj, ours.cross_output),
            (layer.norm1, ours.self_norm),
            (layer.norm2, ours.cross_norm),
            (layer.norm3, ours.feedforward[0]),
            (layer.linear1, ours.feedforward[1]),
            (layer.linear2, ours.feedforward[4]),
        ]
        pairs += [(a.weight, b.weight) for a, b in modules] + [(a.bias, b.bias) for a, b in modules]
        for target, source in pairs:
            target.copy_(source)
    words = [4, 5, 6, 7]
    batch = collate(features, [[words]] * len(features), Vocabulary)
    memory, _ = decoder.remember(features)
    read = decoder.embed(batch.inputs[:, 0], decoder.positions(0, len(words) + 1))
    mask = torch.nn.Transformer.generate_square_subsequent_mask(len(words) + 1, dtype=torch.float64)
    expected = decoder.output(decoder.norm(layer(read, memory.regions, mask)))
    torch.testing.assert_close(decoder(batch), expected.transpose(0, 1).flatten(0, 1))


def test_captions_longer_than_the_learned_positions_are_refused(features) -> None:
    decoder = small_decoder("transformer-learned", num_positions=4)
    assert decoder.max_steps == 4
    decoder(collate(features, [[[4, 5, 6]]] * 5, Vocabulary))
    with pytest.raises(CapstanError, match="needs 5 positions, the Transformer has learned 4; raise decoder_settings"):
        decoder(collate(features, [[[4, 5, 6, 7]]] * 5, Vocabulary))
    with torch.no_grad():
        decoder.output.bias[Vocabulary.eos_id] = -1e9
    assert all(len(hypothesis.token_ids) == 4 for hypothesis in beam_search(decoder, features, 2, 4))
    with pytest.raises(CapstanError, match="needs 5 positions"):
        beam_search(decoder, features, 2, 5)


def test_padding_is_neither_read_nor_computed(features) -> None:
    decoder = small_decoder("transformer")
    captions = random_captions(len(features), 9)
    batch = collate(features, captions, Vocabulary)
    expected = decoder(batch)
    batch.inputs[batch.inputs == Vocabulary.pad_id] = 7
    assert torch.equal(decoder(batch), expected)


def test_a_vocabulary_of_longer_captions_is_refused_before_training() -> None:
    config = small_decoder("transformer-learned", num_positions=4).config
    start_decoder(config, Vocabulary([*SPECIAL, *"abcde"], 3))
    with pytest.raises(CapstanError, match="captions of up to 4 words need num_positions of 5 or more, not 4"):
        start_decoder(config, Vocabulary([*SPECIAL, *"abcde"], 4))
