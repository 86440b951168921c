"""Gradient checkpointing of decoders: the same losses and gradients, less kept, exact resumption.

Encoders' is in tests/test_encoders.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import VARIANTS, random_captions, small_decoder
from test_live import build_recurrent
from test_training import Stop, build, run, stop_at
from test_training_options import EVERYTHING, assert_same, keeper_in

from captioning import penalties
from captioning.datasets import Batch, collate
from captioning.decoders import Decoder
from captioning.encoders import build_encoder
from captioning.evaluation import Tally
from captioning.interruption import Interrupted
from captioning.live import LiveCaptioner
from captioning.precision import autocast
from captioning.train_params import EosSuppression
from captioning.vocabulary import Vocabulary

SUPPRESSION = EosSuppression(min_length=3, weight=0.5)


def a_batch(dtype: torch.dtype = torch.float64, num_images: int = 5) -> Batch:
    features = torch.randn(num_images, 4, 6, generator=torch.Generator().manual_seed(1))
    return collate(features.to(dtype), random_captions(num_images, 9), Vocabulary)


def step(decoder: Decoder, batch: Batch, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any], Tally, Any]:
    """Loss, gradients, tally, and the state of the random numbers after a step, all of them on."""
    decoder.zero_grad()
    torch.manual_seed(3)
    tally = Tally()
    with autocast(torch.device("cpu"), dtype):
        loss = penalties.loss_sum(decoder, batch, 0.1, SUPPRESSION, tally)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, tally, torch.get_rng_state()


@pytest.mark.parametrize("variant", [*VARIANTS, *(f"{name} covering" for name in VARIANTS if "-" in name[:5])])
def test_losses_and_gradients_are_the_plain_ones(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout: the same words are dropped, and again in the backward pass; no random number more is drawn."""
    monkeypatch.setattr(penalties, "TOKENS_A_PIECE", 11)
    name, _, covering = variant.partition(" ")
    options: dict[str, Any] = {"doubly_stochastic": 0.7} if covering else {}
    decoder, batch = small_decoder(name, dropout=0.4, **options).train(), a_batch()
    loss, gradients, tally, state = step(decoder, batch)
    decoder.checkpointed = True
    found = step(decoder, batch)
    # The loss is computed of float32 logits.
    torch.testing.assert_close(found[0], loss, rtol=1e-6, atol=0)
    assert found[1].keys() == gradients.keys()
    for key, expected in gradients.items():
        torch.testing.assert_close(found[1][key], expected, rtol=1e-5, atol=2e-6 * float(expected.abs().max()))
    assert found[2].num_correct == tally.num_correct and found[2].num_tokens == batch.num_tokens
    assert found[2].loss_sum == pytest.approx(tally.loss_sum) and torch.equal(found[3], state)


SOME = ("lstm-bahdanau", "gru-bahdanau-layers", "gru-luong_general-feeding", "lstm-luong_concat", "transformer-encoder")


@pytest.mark.parametrize("variant", SOME)
def test_chunks_do_what_the_whole_does_in_half_precision(variant: str) -> None:
    decoder, batch = small_decoder(variant, dropout=0.2).float().train(), a_batch(torch.float16)
    loss, gradients, *_ = step(decoder, batch, torch.bfloat16)
    decoder.checkpointed = True
    found, others, *_ = step(decoder, batch, torch.bfloat16)
    torch.testing.assert_close(found, loss, rtol=2e-2, atol=0)
    assert all(others[n].dtype == torch.float32 and others[n].isfinite().all() for n in gradients)
    joined = [torch.cat([part[name].flatten() for name in gradients]) for part in (others, gradients)]
    assert (joined[0] - joined[1]).norm() < 0.05 * joined[1].norm()


def kept_for_backward(decoder: Decoder, batch: Batch) -> int:
    """Bytes, each storage counted once, without the parameters' own and the batch's."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [*decoder.parameters(), *vars(batch).values()]
             if isinstance(tensor, torch.Tensor)}  # fmt: skip
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        penalties.loss_sum(decoder, batch, 0.1, None)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("variant", SOME)
def test_less_is_kept(variant: str) -> None:
    sizes: dict[str, Any] = {"hidden_dim": 32, "dropout": 0.1, "vocabulary_size": 200}
    if variant.startswith("transformer"):
        sizes |= {"feedforward_dim": 64}
    else:
        sizes |= {"embedding_dim": 8, "region_dim": 8, "attention_dim": 16}
    decoder = small_decoder(variant, **sizes).train()
    batch = collate(torch.zeros(8, 4, 6).double(), [[[5] * 24] * 3] * 8, Vocabulary)
    plain = kept_for_backward(decoder, batch)
    decoder.checkpointed = True
    assert kept_for_backward(decoder, batch) < 0.5 * plain


def test_chunks_cover_all_steps_and_tokens_once() -> None:
    batch = a_batch()
    decoder = small_decoder()
    decoder.checkpointed = True
    chunks = decoder.chunks(len(batch.extents))
    assert len(chunks) > 1 and [i for c in chunks for i in range(c.start, c.stop)] == list(range(len(batch.extents)))
    numbers = torch.arange(batch.targets.numel()).view_as(batch.targets)
    found = []
    for steps in chunks:
        rows, columns = batch.extents[steps.start]
        found.append(numbers[:rows, :columns, steps].flatten()[batch.places_within(steps)])
    assert torch.cat(found).equal(batch.places)
    with torch.no_grad():
        assert decoder.chunks(9) == [slice(0, 9)]


def test_it_learns_as_the_plain_run_does(tmp_path) -> None:
    histories = []
    for checkpointed in (False, True):
        task, journal = build(tmp_path, num_epochs=4, label_smoothing=0.1, gradient_checkpointing=checkpointed)
        assert task.decoder.checkpointed == checkpointed
        run(task, journal)
        histories.append(task.history)
    for plain, found in zip(*histories, strict=True):
        assert found == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("kill", [True, False])
def test_a_stopped_run_ends_with_the_same_bits(tmp_path, monkeypatch, kill: bool) -> None:
    options = EVERYTHING | {"num_epochs": 5, "gradient_checkpointing": True}
    wanted, journal = build(tmp_path, **options)
    run(wanted, journal)
    for stop in (3, 4, None):
        task, journal = build(tmp_path, **options)
        stop_at(task, stop, kill, monkeypatch)
        if stop is None:
            run(task, journal, keeper_in(tmp_path))
        else:
            with pytest.raises(Stop if kill else Interrupted):
                run(task, journal, keeper_in(tmp_path))
    assert_same(task.state_dict(), wanted.state_dict())
    assert task.history == wanted.history


def test_in_live_mode_the_encoder_is_checkpointed_with_its_decoder() -> None:
    encoder = build_encoder("efficientnet_lite0", "random")
    model = LiveCaptioner(encoder, build_recurrent(encoder), torch.float32)
    model.checkpointed = True
    assert encoder.checkpointed and model.decoder.checkpointed and model.recomputes
    batch = collate(torch.zeros(2, 224, 224, 3, dtype=torch.uint8), random_captions(2, 9), Vocabulary)
    encoder.unfreeze(encoder.stages[-1:])
    penalties.loss_sum(model, batch, 0.0, None).backward()
    found = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    assert found == {name for name, _ in encoder.named_parameters() if encoder.stage_of(name) == encoder.stages[-1]}
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())
