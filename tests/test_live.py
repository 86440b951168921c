"""Live mode: the same steps as cached training where nothing is learnt or changed, and exact resumption where it is."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from loopback import jpeg
from test_checkpoints import settings as recovery
from test_training import Stop, run, settings, stop_at

from captioning import live, training
from captioning.annotations import Annotation
from captioning.checkpoints import Checkpointer
from captioning.datasets import CaptionBatches, FeatureStore
from captioning.decoders import DecoderConfig, build_decoder
from captioning.encoders import Encoder, build_encoder
from captioning.errors import CapstanError
from captioning.evaluation import GreedyCider
from captioning.extraction import extract_features
from captioning.generation import search_store
from captioning.live import ImageStore, LiveBatches, LiveCaptioner
from captioning.loop import Journal
from captioning.shards import ShardWriter
from captioning.train_params import AugmentationParams
from captioning.vocabulary import Vocabulary

CAPTIONS = ["red circle", "blue square on the left", "green circle", "red square", "blue circle", "green square"]
STRONG = AugmentationParams(
    start_strength=0.2, end_strength=1.0, crop=1.0, flip=1.0, colour=1.0, blur=1.0, cutout=1.0
)  # fmt: skip


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build_encoder("efficientnet_lite0", "package")


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    with ShardWriter(folder / "00000.tar") as writer:
        for i in range(len(CAPTIONS)):
            writer.add(f"{i:08d}", jpeg(i), {"image_id": f"test/{i}"})
    # The ledger's digests have their own tests.
    monkeypatch.setattr(live, "verify_shards", lambda folder, names: None)
    monkeypatch.setattr(live, "shard_digests", lambda folder, names: dict.fromkeys(names, "digest"))
    return folder


def annotations() -> list[Annotation]:
    return [
        Annotation(image_id=f"test/{i}", source="test", split="train", shard="00000", key=f"{i:08d}", captions=[text])
        for i, text in enumerate(CAPTIONS)
    ]


def vocabulary() -> Vocabulary:
    return Vocabulary.build(CAPTIONS, 1, 6)


def build_task(make: Any, decoder: Any, num_epochs: int = 3, parts: Any = (), **changes: Any) -> tuple[Any, Journal]:
    store, kind = make
    batches = kind(store, annotations(), vocabulary(), 4)
    cider = GreedyCider(store, [a.captions for a in annotations()], vocabulary(), 8)
    values, journal = settings(num_epochs=num_epochs, log_every_steps=1, **changes), Journal(lambda *entry: None)
    return training.DecoderTask(decoder, batches, batches, cider, values, 0.01, journal, encoder_parts=parts), journal


def build_recurrent(encoder: Encoder) -> Any:
    training.seed_everything(1, True)
    return build_decoder(
        DecoderConfig(
            type="lstm",
            attention="bahdanau",
            context_gate=True,
            vocabulary_size=len(vocabulary()),
            encoder_dim=encoder.encoder_dim,
            embedding_dim=8,
            hidden_dim=16,
            attention_dim=8,
            region_dim=8,
            dropout=0.1,
        )
    )


def live_task(
    shards: Path,
    encoder: Encoder,
    trainable: Any,
    every: int = 0,
    num_epochs: int = 3,
    augment: bool = True,
    **changes: Any,
) -> tuple[Any, Journal]:
    from captioning.augmentation import Augmenter

    augmenter = Augmenter(STRONG, 1, 2 * num_epochs) if augment else None
    store = ImageStore(shards, annotations(), encoder, augmenter)
    model = LiveCaptioner(
        encoder, build_recurrent(encoder), torch.float32, encoder.choose_stages(trainable), every
    )  # fmt: skip
    parts = [(named, 0.001) for named in model.trainable().values()]
    return build_task((store, LiveBatches), model, num_epochs, parts, **changes)


def test_frozen_and_plain_it_is_cached_training_step_by_step(shards: Path, encoder: Encoder, tmp_path: Path) -> None:
    extract_features(encoder, [shards / "00000.tar"], tmp_path, 32, 0, "fp32")
    cached, cached_journal = build_task(
        (FeatureStore(tmp_path, annotations()), CaptionBatches), build_recurrent(encoder)
    )
    task, journal = live_task(shards, encoder, "none", augment=False)
    for each in ((cached, cached_journal), (task, journal)):
        run(*each)
    losses = [[line["train/loss"] for line in metrics(j) if "train/loss" in line] for j in (cached_journal, journal)]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)  # the cache's features are float16
    found = [
        [h.token_ids for h in search_store(each.decoder, each.train.store, each.device, range(6), 4, 3, 6)]
        for each in (cached, task)
    ]
    assert found[0] == found[1]


def metrics(journal: Journal) -> list[dict[str, float]]:
    import json

    return [json.loads(line)["metrics"] for line in journal.lines]


def test_stages_thaw_one_after_another_and_the_rest_never_moves(shards: Path) -> None:
    encoder = build_encoder("efficientnet_lite0", "package")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    task, journal = live_task(shards, encoder, 2, every=1)
    moved: list[set[str]] = []
    end_epoch = task.end_epoch

    def watch(*arguments: Any) -> str:
        changed = {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}
        moved.append({encoder.stage_of(name) for name in changed})
        return end_epoch(*arguments)

    task.end_epoch = watch
    run(task, journal)
    last_two = encoder.stages[-2:]
    assert moved == [set(), {last_two[1]}, set(last_two)]
    state = encoder.state_dict()
    statistics = [name for name in before if "running_" in name]
    assert statistics and all(torch.equal(state[name], before[name]) for name in statistics)


CRITICAL = {"self_critical": {"start_epoch": 2, "num_samples": 2, "rate_factor": 0.5, "cross_entropy_weight": 0.1}}


@pytest.mark.parametrize(("stop", "changes"), [(1, {}), (3, {}), (4, {}), (4, CRITICAL)])
def test_a_stopped_run_ends_with_the_same_bits(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, changes: Any
) -> None:
    wanted, journal = live_task(shards, build_encoder("efficientnet_lite0", "package"), 1, every=1, **changes)
    run(wanted, journal)
    for at in (stop, None):
        task, journal = live_task(shards, build_encoder("efficientnet_lite0", "package"), 1, every=1, **changes)
        lock = os.open(os.devnull, os.O_RDWR)
        keeper = Checkpointer(tmp_path / "checkpoints", "print", recovery(checkpoint_steps=1), lock)
        stop_at(task, at, True, monkeypatch)
        if at is None:
            run(task, journal, keeper)
        else:
            with pytest.raises(Stop):
                run(task, journal, keeper)
        os.close(lock)
    final = task.decoder.state_dict()
    assert all(torch.equal(value, final[name]) for name, value in wanted.decoder.state_dict().items())


def test_augmentation_depends_on_seed_epoch_and_image_alone(shards: Path, encoder: Encoder) -> None:
    task, _ = live_task(shards, encoder, "none")
    store, draws = task.train.store, task.train.draw_views(1, 2)
    assert draws == task.train.draw_views(1, 2) and draws != task.train.draw_views(1, 1)
    together = store.gather([0, 1, 2], [draws[i] for i in (0, 1, 2)])
    apart = torch.cat([store.gather([i], [draws[i]]) for i in (2, 1, 0)]).flip(0)
    assert torch.equal(together, apart)
    assert not torch.equal(together, store.gather([0, 1, 2]))
    assert store._may_flip == ["left" not in caption for caption in CAPTIONS]


def test_an_image_that_is_not_there(shards: Path, encoder: Encoder) -> None:
    strange = SimpleNamespace(image_id="test/9", shard="00000", key="00000009", captions=[])
    with pytest.raises(CapstanError, match="lacks 1 images"):
        ImageStore(shards, [strange], encoder)


def test_the_encoders_rate_and_the_augmentations_strength_are_logged(shards: Path) -> None:
    task, journal = live_task(shards, build_encoder("efficientnet_lite0", "package"), 1)
    run(task, journal)
    found = [line for line in metrics(journal) if "train/loss" in line]
    ratios = [line["train/encoder_learning_rate"] / line["train/learning_rate"] for line in found[1:]]  # 0 at first
    assert ratios == pytest.approx([0.1] * 5)
    strengths = [line["train/augmentation_strength"] for line in found]
    assert strengths == pytest.approx([0.2 * 5 ** (step / 5) for step in range(6)])
    used = {strength for epoch in range(3) for _, strength in task.train.draw_views(1, epoch)}
    assert set(strengths) == used


def test_what_is_not_there_is_not_logged(shards: Path, encoder: Encoder) -> None:
    task, journal = live_task(shards, encoder, "none", num_epochs=1, augment=False)
    run(task, journal)
    names = {name for line in metrics(journal) for name in line}
    assert "train/loss" in names and not names & {"train/encoder_learning_rate", "train/augmentation_strength"}
