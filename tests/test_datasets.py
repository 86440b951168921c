from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch
from conftest import random_captions
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning import feature_files
from captioning.annotations import Annotation
from captioning.datasets import CaptionBatches, FeatureStore, collate, epoch_order
from captioning.distributed import World
from captioning.errors import CapstanError
from captioning.feature_files import open_features, write_features, writing_features
from captioning.vocabulary import Vocabulary

ENCODER = {"name": "test", "grid": [2, 2]}


def write_shard(folder, shard: str, num_images: int, first: int = 0, views=("plain",)) -> np.ndarray:
    """Returns (num_images, 4, 6), or with several views (num_images, num_views, 4, 6)."""
    shape = (num_images, len(views), 4, 6) if len(views) > 1 else (num_images, 4, 6)
    values = np.random.default_rng(first).normal(size=shape).astype(np.float16)
    keys = [f"{first + i:08d}" for i in range(num_images)]
    write_features(folder / f"{shard}.h5", keys, values, ENCODER, "digest", views)
    return values


def annotation(index: int, shard: str, split: str = "train") -> Annotation:
    return Annotation(
        image_id=f"s/{index}", source="s", split=split, shard=shard, key=f"{index:08d}", captions=["a b", "a c b c"]
    )


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_collate_keeps_every_token_once(seed: int) -> None:
    captions = random_captions(6, 12, seed)
    features = torch.arange(6.0)[:, None, None].expand(6, 1, 1)
    batch = collate(features, captions, Vocabulary)
    expected = sorted(tuple(words) for group in captions for words in group)
    rows = batch.targets.flatten(0, 1)
    found = sorted(tuple(r[r > Vocabulary.eos_id].tolist()) for r in rows if (r != Vocabulary.pad_id).any())
    assert found == expected
    assert batch.num_tokens == sum(len(words) + 1 for words in expected)
    ordered = [sorted(map(len, captions[int(i)]), reverse=True) for i in batch.features[:, 0, 0]]
    assert [lengths[0] for lengths in ordered] == sorted((lengths[0] for lengths in ordered), reverse=True)
    places = torch.cat([batch.targets[:r, :c, t].reshape(-1) for t, (r, c) in enumerate(batch.extents)])
    assert torch.equal(places[batch.kept], batch.packed_targets)
    assert torch.equal(batch.targets.view(-1)[batch.places], batch.packed_targets)
    outside = batch.targets.clone()
    for step, (rows_, columns) in enumerate(batch.extents):
        outside[:rows_, :columns, step] = Vocabulary.pad_id
    assert (outside == Vocabulary.pad_id).all()


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)]
    assert len(set(orders)) == 4 and all(sorted(order) == list(range(50)) for order in orders)
    assert orders[1] == tuple(epoch_order(50, 1, 1))
    assert torch.equal(state[0], torch.get_rng_state()) and (state[1] == np.random.get_state()[1]).all()


def test_store_gathers_across_shards(tmp_path) -> None:
    first, second = write_shard(tmp_path, "00000", 3), write_shard(tmp_path, "00001", 2, first=10)
    images = [annotation(11, "00001"), annotation(0, "00000"), annotation(2, "00000")]
    store = FeatureStore(tmp_path, images)
    expected = np.stack([second[1], first[0], first[2]])
    assert store.gather([0]).dtype == torch.float16
    assert np.array_equal(store.gather([0, 1, 2]).numpy(), expected)
    assert store.encoder == ENCODER


def test_epochs_can_start_in_the_middle(tmp_path) -> None:
    write_shard(tmp_path, "00000", 7)
    images = [annotation(i, "00000") for i in range(7)]
    vocabulary = Vocabulary.build(["a b c"], 1, 3)
    batches = CaptionBatches(FeatureStore(tmp_path, images), images, vocabulary, 2)
    order = epoch_order(7, 0, 0)
    whole = [share.batch.features for share in batches.epoch(order)]
    assert len(whole) == len(batches) == 4
    rest = [share.batch.features for share in batches.epoch(order, first_batch=2)]
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))
    assert max(len(words) for group in batches.captions for words in group) == 3  # cut to max_length


VIEWS = ("plain", "mirror", "center")


def test_store_gathers_views(tmp_path) -> None:
    first, second = (write_shard(tmp_path, f"{n:05d}", 3, 10 * n, VIEWS) for n in range(2))
    images = [annotation(11, "00001"), annotation(0, "00000"), annotation(2, "00000")]
    store = FeatureStore(tmp_path, images, verify=True)
    assert store.views == list(VIEWS)
    assert np.array_equal(store.gather([2, 0, 1]).numpy(), np.stack([first[2, 0], second[1, 0], first[0, 0]]))
    assert np.array_equal(
        store.gather([2, 0, 2], [1, 2, 0]).numpy(), np.stack([first[2, 1], second[1, 2], first[2, 0]])
    )
    write_shard(tmp_path, "00001", 3, 10)
    with pytest.raises(CapstanError, match="00001.h5 has other views"):
        FeatureStore(tmp_path, images)


def view_batches(folder, num_images: int, batch_size: int) -> CaptionBatches:
    images = [annotation(i, "00000") for i in range(num_images)]
    return CaptionBatches(FeatureStore(folder, images), images, Vocabulary.build(["a b c"], 1, 3), batch_size)


def views_seen(values: np.ndarray, shares: list) -> dict[int, int]:
    """Which view of each image the batches held."""
    blocks = [block for share in shares if share.batch for block in share.batch.features.numpy()]
    places = [np.argwhere((values == block).all((2, 3))) for block in blocks]
    return {int(place[0][0]): int(place[0][1]) for place in places}


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_an_images_view_depends_on_seed_epoch_and_image_alone(tmp_path, num_processes: int) -> None:
    values = write_shard(tmp_path, "00000", 40, views=VIEWS)
    expected = {}
    for epoch in range(6):
        batches = view_batches(tmp_path, 40, 40)
        expected[epoch] = dict(enumerate(batches.draw_views(5, epoch)))
        assert views_seen(values, list(batches.epoch(views=batches.draw_views(5, epoch)))) == expected[epoch]
    for epoch in range(6):  # smaller batches, another order, several processes, from the middle
        batches, order = view_batches(tmp_path, 40, 7), epoch_order(40, 5, epoch)
        for first in (0, 3):
            found: dict[int, int] = {}
            for rank in range(num_processes):
                world = World(rank, num_processes)
                found |= views_seen(values, list(batches.epoch(order, first, world, batches.draw_views(5, epoch))))
            assert found == {i: expected[epoch][i] for i in order[first * 7 :]}
    fewer = view_batches(tmp_path, 9, 4).draw_views(5, 2)  # other images change nothing
    assert fewer == [expected[2][i] for i in range(9)]


def test_every_view_is_drawn_as_often_and_anew_each_epoch(tmp_path) -> None:
    write_shard(tmp_path, "00000", 200, views=VIEWS)
    batches = view_batches(tmp_path, 200, 8)
    drawn = np.array([batches.draw_views(0, epoch) for epoch in range(30)])  # (epochs, images)
    assert np.abs(np.bincount(drawn.ravel(), minlength=3) / drawn.size - 1 / 3).max() < 0.03
    assert len({tuple(row) for row in drawn}) == 30 and all(len(set(image)) == 3 for image in drawn.T)
    assert batches.draw_views(1, 0) != batches.draw_views(0, 0)


def test_one_view_draws_nothing_and_validation_sees_the_plain_one(tmp_path) -> None:
    write_shard(tmp_path, "00000", 4)
    assert view_batches(tmp_path, 4, 4).draw_views(0, 0) is None
    values = write_shard(tmp_path, "00000", 4, views=VIEWS)
    assert set(views_seen(values, list(view_batches(tmp_path, 4, 4).epoch())).values()) == {0}


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
def test_processes_share_every_batch_and_know_its_size(tmp_path, num_processes) -> None:
    """Each image goes to one rank; all know the whole batch's tokens; a rank may have nothing of the last batch."""
    write_shard(tmp_path, "00000", 9)
    images = [annotation(i, "00000") for i in range(9)]
    vocabulary = Vocabulary.build(["a b c"], 1, 3)
    batches = CaptionBatches(FeatureStore(tmp_path, images), images, vocabulary, 4)
    order = epoch_order(9, 0, 0)
    alone = list(batches.epoch(order))
    ranks = [list(batches.epoch(order, world=World(rank, num_processes))) for rank in range(num_processes)]
    for number, whole in enumerate(alone):
        parts = [rank[number] for rank in ranks]
        assert {part.num_tokens for part in parts} == {whole.num_tokens} == {whole.batch.num_tokens}
        assert sum(part.batch.num_tokens for part in parts if part.batch) == whole.num_tokens
        assert sum(len(part.batch.features) for part in parts if part.batch) == len(whole.batch.features)
    assert (ranks[-1][-1].batch is None) == (num_processes > 1)


def test_missing_features_are_named(tmp_path) -> None:
    with pytest.raises(CapstanError, match=r"00000.h5 is missing: run `dvc repro features`"):
        FeatureStore(tmp_path, [annotation(0, "00000")])
    write_shard(tmp_path, "00000", 1)
    with pytest.raises(CapstanError, match=r"no features for 1 images \(s/5"):
        FeatureStore(tmp_path, [annotation(5, "00000")])


def test_every_flipped_byte_of_features_is_found(tmp_path) -> None:
    path = tmp_path / "00000.h5"
    write_shard(tmp_path, "00000", 3)
    with h5py.File(path) as file:
        start, length = file["features"].id.get_offset(), file["features"].nbytes
    good = path.read_bytes()
    for place in range(start, start + length, 7):
        damaged = bytearray(good)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CapstanError, match="damaged"):
            open_features(path, verify=True)
    path.write_bytes(good)
    assert open_features(path, verify=True).keys == ["00000000", "00000001", "00000002"]


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_truncated_features_are_refused(tmp_path, length) -> None:
    path = tmp_path / "00000.h5"
    write_shard(tmp_path, "00000", 3)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CapstanError, match="damaged"):
        open_features(path, verify=True)


def test_feature_files_are_the_same_bytes_each_time(tmp_path) -> None:
    write_shard(tmp_path, "a", 3)
    write_shard(tmp_path, "b", 3)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_features_written_batch_by_batch_are_the_same_bytes(tmp_path) -> None:
    values = write_shard(tmp_path, "whole", 7, views=VIEWS)
    keys = open_features(tmp_path / "whole.h5").keys
    with writing_features(tmp_path / "parts.h5", 7, VIEWS, ENCODER, "digest") as writer:
        for part in (slice(0, 1), slice(1, 6), slice(6, 7)):
            writer.add(keys[part], values[part])
    assert (tmp_path / "parts.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    mapped = open_features(tmp_path / "parts.h5", verify=True).features
    assert np.array_equal(mapped, values) and mapped[3, 1].flags.c_contiguous


def test_a_file_that_is_not_finished_does_not_appear(tmp_path) -> None:
    with pytest.raises(RuntimeError), writing_features(tmp_path / "0.h5", 2, ["plain"], ENCODER, "digest") as writer:
        writer.add(["0"], np.zeros((1, 1, 4, 6), np.float16))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_features_of_an_older_schema_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(feature_files, "SCHEMA_VERSION", 1)
    write_shard(tmp_path, "00000", 2)
    monkeypatch.undo()
    with pytest.raises(CapstanError, match="00000.h5 has another schema; run `dvc repro`"):
        open_features(tmp_path / "00000.h5", verify=True)
