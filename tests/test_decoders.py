from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from conftest import VARIANTS, random_captions, small_decoder
from torch.nn import functional

from captioning import models
from captioning.attention import build_attention
from captioning.datasets import collate
from captioning.decoders import DecoderConfig, build_decoder
from captioning.decoders.recurrent import RecurrentDecoder
from captioning.errors import CapstanError
from captioning.penalties import doubly_stochastic
from captioning.vocabulary import SPECIAL, Vocabulary


def stepwise_logits(decoder, features, words: list[int]) -> torch.Tensor:
    """One image, one caption, word by word: (num_tokens, vocabulary_size)."""
    memory, state = decoder.remember(features)
    logits = []
    for word in [Vocabulary.bos_id, *words]:
        step = decoder.step(memory, state, torch.tensor([[word]]))
        logits.append(step.logits[0, 0])
        state = step.state
    return torch.stack(logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_captions_equal_word_by_word(variant, features) -> None:
    decoder = small_decoder(variant)
    captions = random_captions(len(features), 9)
    batch = collate(features, captions, Vocabulary)
    loss = functional.cross_entropy(decoder(batch), batch.packed_targets, reduction="sum")
    expected = 0.0
    for image, group in zip(features, captions, strict=True):
        for words in group:
            targets = torch.tensor([*words, Vocabulary.eos_id])
            logits = stepwise_logits(decoder, image[None], words)
            expected += functional.cross_entropy(logits, targets, reduction="sum").item()
    assert batch.num_tokens == sum(len(words) + 1 for group in captions for words in group)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter(variant, features) -> None:
    decoder = small_decoder(variant)
    batch = collate(features, random_captions(len(features), 9), Vocabulary)
    functional.cross_entropy(decoder(batch), batch.packed_targets).backward()
    still = [n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still


def test_attend_first_lstm_is_torchs_lstm_cell(features) -> None:
    decoder = small_decoder("lstm-bahdanau")
    cell = torch.nn.LSTMCell(5 + 8, 8).double()
    hidden_dim = 8
    order = [0, 1, 3, 2]  # ours: write, keep, show, new; torch's: input, forget, cell, output
    with torch.no_grad():
        weight = torch.cat([decoder.word_gates.weight, decoder.context_gates.weight], 1)
        for ours, target in (
            (weight, cell.weight_ih),
            (decoder.hidden_gates.weight, cell.weight_hh),
            (decoder.word_gates.bias, cell.bias_ih),
            (decoder.hidden_gates.bias, cell.bias_hh),
        ):
            target.copy_(torch.cat([ours.split(hidden_dim)[i] for i in order]))
    memory, state = decoder.remember(features)
    words = torch.randint(4, 9, (len(features), 1))
    context, _ = decoder.attention(state[0], memory.keys, memory.regions)
    gated = context * decoder.context_gate(state[0]).sigmoid()
    inputs = torch.cat([decoder.embed(words), gated], -1)[:, 0]
    hidden, memory_cell = cell(inputs, (state[0][:, 0], state[1][:, 0]))
    after = decoder.step(memory, state, words).state
    torch.testing.assert_close(after[0][:, 0], hidden)
    torch.testing.assert_close(after[1][:, 0], memory_cell)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_weights_are_a_distribution(variant, features) -> None:
    decoder = small_decoder(variant)
    memory, state = decoder.remember(features)
    weights = decoder.step(memory, state, torch.full((5, 1), 4)).attention_weights
    assert weights.shape == (5, 1, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, 1, dtype=torch.float64))


def plain_additive(attention, queries, regions) -> tuple[torch.Tensor, torch.Tensor]:
    """Bahdanau et al. 2015, appendix A.1.2, as it is printed."""
    sums = attention.query(queries)[:, :, None] + attention.key(regions)[:, None]
    weights = attention.score(sums.tanh()).squeeze(-1).softmax(-1)
    return weights @ regions, weights


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_additive_attention_is_the_plain_formula(scale) -> None:
    attention = build_attention("luong_concat", 3, 4, 5).double()
    queries = (torch.randn(2, 3, 3, dtype=torch.float64) * scale).requires_grad_()
    regions = (torch.randn(2, 6, 4, dtype=torch.float64) * scale).requires_grad_()
    inputs = (queries, regions, *attention.parameters())
    expected = plain_additive(attention, queries, regions)
    found = attention(queries, attention.keys(regions), regions)
    torch.testing.assert_close(found, expected)
    seed = torch.randn_like(expected[0])
    gradients = [torch.autograd.grad((context * seed).sum(), inputs) for context, _ in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_additive_attention_survives_extreme_values() -> None:
    attention = build_attention("bahdanau", 3, 4, 5)
    queries, regions = torch.tensor([[[3e4, -3e4, 0.0]]]), torch.tensor([[[1e5, 0, 0, 0], [-1e5, 1, 2, 3]]])
    context, weights = attention(queries, attention.keys(regions.requires_grad_()), regions)
    context.sum().backward()
    assert regions.grad.isfinite().all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1))


def plain_logits(decoder, batch) -> torch.Tensor:
    """All captions of all images at all steps, by autograd's own rules: what `unroll` must equal."""
    memory, state = decoder.remember(batch.features)
    state = tuple(part.expand(-1, batch.inputs.shape[1], -1) for part in state)
    logits = []
    for words in batch.inputs.unbind(-1):
        context, _ = plain_additive(decoder.attention, state[0], memory.regions)
        gated = context * decoder.context_gate(state[0]).sigmoid()
        inputs = decoder.word_gates(decoder.embed(words)) + decoder.context_gates(gated)
        state, _ = decoder.cell.advance(inputs, decoder.hidden_gates(state[0]), state)
        logits.append(decoder.output(decoder.combine(state[0], gated)))
    return torch.stack(logits, -2).flatten(0, 2).index_select(0, batch.places)


@pytest.mark.parametrize("variant", ["lstm-bahdanau", "gru-bahdanau", "lstm-bahdanau-raw", "gru-bahdanau-raw"])
def test_gradients_are_those_of_the_plain_steps(variant, features) -> None:
    decoder = small_decoder(variant)
    batch = collate(features, random_captions(len(features), 9), Vocabulary)
    batch.features.requires_grad_()
    inputs = (batch.features, *decoder.parameters())
    losses = [
        functional.cross_entropy(logits, batch.packed_targets, label_smoothing=0.1)
        for logits in (decoder(batch), plain_logits(decoder, batch))
    ]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, inputs) for loss in losses), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", ["lstm-bahdanau", "gru-bahdanau"])
def test_bf16_gradients_are_no_further_off_than_autograds(variant, features) -> None:
    decoder = small_decoder(variant).float()
    batch = collate(features.float(), random_captions(len(features), 9), Vocabulary)

    def gradients(logits, low: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = functional.cross_entropy(logits(batch).float(), batch.packed_targets)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(decoder.parameters()))])

    exact = gradients(decoder, low=False)
    ours = (gradients(decoder, low=True) - exact).norm() / exact.norm()
    plain = (gradients(lambda batch: plain_logits(decoder, batch), low=True) - exact).norm() / exact.norm()
    assert 0 < ours < 1.25 * plain < 0.05


def test_wrong_settings_name_the_choices() -> None:
    with pytest.raises(CapstanError, match=r"unknown decoder type 'lstn'. Did you mean 'lstm'\? Choices: gru, lstm"):
        build_decoder(
            DecoderConfig(
                type="lstn",
                attention="bahdanau",
                context_gate=True,
                vocabulary_size=9,
                encoder_dim=6,
                embedding_dim=5,
                hidden_dim=8,
                attention_dim=7,
                region_dim=8,
                dropout=0.0,
            )
        )
    with pytest.raises(CapstanError, match="unknown attention"):
        build_attention("luong", 3, 4, 5)
    with pytest.raises(CapstanError, match="luong_dot needs hidden_dim"):
        build_attention("luong_dot", 3, 4, 5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_decoder_trains_in_half_precision(variant, dtype, features) -> None:
    decoder = small_decoder(variant).float()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(0.5)  # larger ones make input feeding chaotic: any rounding grows from step to step
    if dtype == torch.float16 and any(isinstance(module, torch.nn.LSTM) for module in decoder.modules()):
        pytest.skip("torch has no float16 LSTM for CPUs")
    batch = collate(features.half(), random_captions(len(features), 9), Vocabulary)
    gradients = []
    for low in (True, False):
        with torch.autocast("cpu", dtype, enabled=low):
            logits = decoder(batch)
        loss = functional.cross_entropy(logits.float(), batch.packed_targets)
        found = torch.autograd.grad(loss, list(decoder.parameters()))
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    assert 0 < (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 0.15


RECURRENT = [variant for variant in VARIANTS if not variant.startswith("transformer")]


@pytest.mark.parametrize("variant", [v for v in RECURRENT if not VARIANTS[v].get("input_feeding")])
def test_whole_captions_have_the_gradients_of_single_steps(variant, features) -> None:
    decoder = small_decoder(variant)
    batch = collate(features, random_captions(len(features), 9), Vocabulary)
    batch.features.requires_grad_()
    inputs = (batch.features, *decoder.parameters())
    plain = decoder.output(RecurrentDecoder.run(decoder, batch)[0])
    losses = [functional.cross_entropy(logits, batch.packed_targets) for logits in (decoder(batch), plain)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, inputs) for loss in losses), rtol=1e-9, atol=1e-12)


def stepwise_coverage(decoder, image, words: list[int]) -> torch.Tensor:
    memory, state = decoder.remember(image[None])
    total = torch.zeros(image.shape[0], dtype=image.dtype)
    for word in [Vocabulary.bos_id, *words]:
        step = decoder.step(memory, state, torch.tensor([[word]]))
        total, state = total + step.attention_weights[0, 0], step.state
    return total


@pytest.mark.parametrize("variant", RECURRENT)
def test_coverage_is_the_attention_summed_over_each_caption(variant, features) -> None:
    decoder = small_decoder(variant)
    captions = random_captions(len(features), 9)
    batch = collate(features, captions, Vocabulary)
    vectors, coverage = decoder.read_with_coverage(batch)
    logits = decoder.output(vectors)
    torch.testing.assert_close(logits, decoder(batch), rtol=1e-12, atol=1e-12)
    found = [
        stepwise_coverage(decoder, image, words)
        for image, group in zip(features, captions, strict=True)
        for words in group
    ]
    order = sorted(range(len(found)), key=lambda i: found[i].tolist())
    ours = sorted(range(len(coverage)), key=lambda i: coverage[i].tolist())
    torch.testing.assert_close(coverage[ours], torch.stack([found[i] for i in order]))


@pytest.mark.parametrize("variant", ["lstm-bahdanau", "gru-luong_general", "lstm-bahdanau-feeding"])
def test_the_doubly_stochastic_term_spreads_attention_over_the_caption(variant, features) -> None:
    """Captions of 3 words and eos on 4 regions: each region can get its 1."""
    decoder = small_decoder(variant)
    batch = collate(features, [[[4, 5, 6], [7, 8, 4]]] * len(features), Vocabulary)
    optimizer = torch.optim.Adam(decoder.parameters(), 0.05)
    terms = []
    for _ in range(40):
        _, coverage = decoder.read_with_coverage(batch)
        terms.append(doubly_stochastic(coverage))
        optimizer.zero_grad()
        terms[-1].backward()
        optimizer.step()
    assert terms[0].item() == pytest.approx(((1 - coverage_of(small_decoder(variant), batch)) ** 2).sum().item())
    assert terms[-1] < 0.1 * terms[0]
    torch.testing.assert_close(coverage, torch.ones_like(coverage), rtol=0, atol=0.5)


def coverage_of(decoder, batch) -> torch.Tensor:
    return decoder.read_with_coverage(batch)[1].detach()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_decoder_comes_back(variant, features, tmp_path) -> None:
    decoder = small_decoder(variant).float()
    save(tmp_path / "model", decoder.config, decoder)
    loaded = models.load_captioner(tmp_path / "model").decoder
    assert asdict(loaded.config) == json.loads(json.dumps(asdict(decoder.config)))
    batch = collate(features.float(), random_captions(len(features), 9), Vocabulary)
    assert torch.equal(loaded(batch), decoder(batch))


def save(folder, config: DecoderConfig, decoder) -> None:
    encoder = SimpleNamespace(state_dict=dict, describe=lambda: {"name": "none", "grid": [2, 2]})
    vocabulary = Vocabulary([*SPECIAL, *"abcde"], 9)
    models.save_captioner(folder, encoder, decoder.state_dict(), config, vocabulary, {})


@pytest.mark.parametrize("other", ["lstm-bahdanau-layers", "lstm-luong_general", "lstm-bahdanau-raw", "transformer"])
def test_weights_of_another_shape_are_refused_by_name(other, tmp_path) -> None:
    save(tmp_path / "model", small_decoder("lstm-bahdanau").config, small_decoder(other))
    with pytest.raises(CapstanError, match=r"model.safetensors does not fit config.json"):
        models.load_captioner(tmp_path / "model")


def test_dropout_between_layers_comes_from_torchs_generator(features) -> None:
    decoder = small_decoder("lstm-luong_general-layers", dropout=0.5).train()
    batch = collate(features, random_captions(len(features), 9), Vocabulary)
    losses = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        losses.append(decoder(batch).sum().item())
    assert losses[0] == losses[2] != losses[1]


def test_show_and_tell_sees_the_mean_alone(features) -> None:
    for variant in ("lstm-none", "gru-none-zeros"):
        decoder = small_decoder(variant, region_dim=None)
        batch = collate(features, random_captions(len(features), 9), Vocabulary)
        mean = features.mean(1, keepdim=True)
        same = collate(mean.expand_as(features), random_captions(len(features), 9), Vocabulary)
        other = collate(features + 1, random_captions(len(features), 9), Vocabulary)
        torch.testing.assert_close(decoder(batch), decoder(same))
        assert not torch.allclose(decoder(batch), decoder(other))
