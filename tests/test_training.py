from __future__ import annotations

import numpy as np
import pytest
import torch
from test_datasets import annotation, write_shard

from captioning import training
from captioning.datasets import CaptionBatches, FeatureStore
from captioning.decoders import DecoderConfig, build_decoder
from captioning.errors import CapstanError
from captioning.evaluation import GreedyCider, evaluate_loss
from captioning.params import TrainParams
from captioning.schedules import cosine_with_warmup
from captioning.vocabulary import Vocabulary

WORDS = "red blue green circle square".split()


def settings(**changes) -> TrainParams:
    values = dict(
        num_epochs=25, batch_size=4, weight_decay=0.01, warmup_steps=5, label_smoothing=0.0, clip_norm=5.0,
        log_every_steps=10, precision="fp32", seed=1, deterministic=True,
    )  # fmt: skip
    return TrainParams(**(values | changes))


def build(tmp_path, **changes):
    """A task that can be learnt by heart: each image's features decide its caption of two words."""
    write_shard(tmp_path, "00000", 12)
    vocabulary = Vocabulary.build([" ".join(WORDS)], 1, 4)
    images = [
        annotation(i, "00000").model_copy(update={"captions": [f"{WORDS[i % 3]} {WORDS[3 + i % 2]}"]})
        for i in range(12)
    ]
    store = FeatureStore(tmp_path, images)
    batches = CaptionBatches(store, images, vocabulary, 4)
    cider = GreedyCider(store, [a.captions for a in images], vocabulary, 8)
    values = settings(**changes)
    training.seed_everything(values.seed, values.deterministic)
    decoder = build_decoder(DecoderConfig("lstm", "bahdanau", len(vocabulary), 6, 16, 32, 16, 16, 0.1))
    logged: list[tuple[int, dict[str, float]]] = []
    trainer = training.Trainer(decoder, batches, batches, cider, values, 0.02, lambda *entry: logged.append(entry))
    return trainer, logged


def test_it_learns_and_keeps_the_best(tmp_path) -> None:
    trainer, logged = build(tmp_path)
    before = evaluate_loss(trainer.decoder, trainer.val, trainer.device)
    best = trainer.run()
    ciders = [record["val_CIDEr"] for record in trainer.history]
    assert trainer.history[-1]["val_loss"] < before / 4
    assert best.cider == max(ciders) > 3 and best.epoch == ciders.index(max(ciders))
    trainer.decoder.load_state_dict(best.state)
    assert trainer.val_cider(trainer.decoder, trainer.device) == best.cider
    assert trainer.step == trainer.num_steps == 75
    assert [step for step, values in logged if "train/loss" in values] == list(range(10, 76, 10))


def test_the_same_seed_gives_the_same_weights(tmp_path) -> None:
    first = build(tmp_path, num_epochs=2)[0].run()
    second = build(tmp_path, num_epochs=2)[0].run()
    third = build(tmp_path, num_epochs=2, seed=2)[0].run()
    assert all(torch.equal(first.state[n], second.state[n]) for n in first.state)
    assert not all(torch.equal(first.state[n], third.state[n]) for n in first.state)


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path) -> None:
    trainer, _ = build(tmp_path, num_epochs=1)
    with torch.no_grad():
        trainer.decoder.output.weight.fill_(float("nan"))
    with pytest.raises(CapstanError, match="the loss is nan at step 1: lower the learning rate"):
        trainer.run()


def test_weight_decay_leaves_biases_and_embeddings_alone(tmp_path) -> None:
    trainer, _ = build(tmp_path)
    decayed, plain = trainer.optimizer.param_groups
    assert all(p.ndim > 1 for p in decayed["params"]) and plain["weight_decay"] == 0
    assert any(p is trainer.decoder.embedding.weight for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(trainer.decoder.parameters()))


def test_cosine_schedule_against_torchs() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90)
    for step in range(10, 100):
        assert cosine_with_warmup(step, 10, 100) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        reference.step()
    warmup = [cosine_with_warmup(step, 10, 100) for step in range(10)]
    assert np.allclose(np.diff(warmup), 1 / 11) and warmup[0] == pytest.approx(1 / 11)
    assert cosine_with_warmup(100, 10, 100) == cosine_with_warmup(500, 10, 100) == 0
