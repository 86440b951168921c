"""From shards to feature files: order, content, the same bytes again, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from loopback import jpeg

from captioning import extraction, precision
from captioning.encoders import Encoder, build_encoder
from captioning.errors import CapstanError
from captioning.extraction import encode_on_cpu, extract_features, read_batches
from captioning.feature_files import open_features
from captioning.images import decode_image
from captioning.shards import ShardWriter, iterate_shard
from captioning.views import VIEWS


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build_encoder("efficientnet_lite0", "package")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """19 and 3 images: whole batches of 8 and parts, of one shard's images only."""
    folder, number = tmp_path_factory.mktemp("shards"), 0
    for name, num_images in (("00000", 19), ("00001", 3)):
        with ShardWriter(folder / f"{name}.tar") as writer:
            for _ in range(num_images):
                writer.add(f"{number:08d}", jpeg(number), {"image_id": f"test/{number}"})
                number += 1
    return sorted(folder.glob("*.tar"))


@torch.inference_mode()
def expected_features(encoder: Encoder, shard: Path, view: str = "plain") -> tuple[list[str], np.ndarray]:
    """One image at a time, by the encoder itself."""
    seen = [(key, VIEWS[view](decode_image(data))) for key, data, _ in iterate_shard(shard)]
    found = [(key, encoder.transform.resize(image)) for key, image in seen]
    features = [encoder(torch.from_numpy(pixels.copy())[None])[0].half().numpy() for _, pixels in found]
    return [key for key, _ in found], np.stack(features)


def extract(encoder: Encoder, todo: list[Path], out: Path, precision: str = "fp32") -> None:
    extract_features(encoder, todo, out, batch_size=32, num_workers=0, precision=precision)


def test_files_hold_each_shards_features_in_its_order(encoder: Encoder, shards: list[Path], tmp_path: Path) -> None:
    extract(encoder, shards, tmp_path)
    for shard in shards:
        keys, features = expected_features(encoder, shard)
        found = open_features(tmp_path / f"{shard.stem}.h5", verify=True)
        assert found.keys == keys and found.encoder == encoder.describe()
        assert found.views == ["plain"] and found.features.shape[1] == 1
        np.testing.assert_allclose(found.features[:, 0], features, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_shard_done_again_has_the_same_bytes(
    encoder: Encoder, shards: list[Path], tmp_path: Path, precision: str
) -> None:
    extract(encoder, shards, tmp_path / "all", precision)
    extract(encoder, shards[1:], tmp_path / "again", precision)
    assert (tmp_path / "again/00001.h5").read_bytes() == (tmp_path / "all/00001.h5").read_bytes()


def test_without_onednn_the_encoder_itself_runs(
    encoder: Encoder, shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "can_fuse", lambda dtype: False)
    monkeypatch.setattr(extraction, "fuse_encoder", None)
    found = list(encode_on_cpu(encoder, shards[1:], 2, torch.float32))
    assert [(index, len(keys)) for index, keys, _ in found] == [(0, 2), (0, 1)]
    _, expected = expected_features(encoder, shards[1])
    np.testing.assert_allclose(np.concatenate([f[:, 0] for _, _, f in found]), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_worker_processes_keep_the_order(encoder: Encoder, shards: list[Path], num_workers: int) -> None:
    found = list(extraction._encode_on_gpu(encoder, shards, 4, num_workers, torch.float32))
    assert [index for index, _, _ in found] == [0, 0, 0, 0, 0, 1]
    for number, shard in enumerate(shards):
        keys, features = expected_features(encoder, shard)
        assert [key for index, part, _ in found if index == number for key in part] == keys
        mine = np.concatenate([part[:, 0] for index, _, part in found if index == number])
        np.testing.assert_allclose(mine, features, rtol=2e-3, atol=2e-3)


def test_threads_are_torchs_own_again_however_it_ends(encoder: Encoder, shards: list[Path]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        batches = encode_on_cpu(encoder, shards, 8, torch.float32)
        next(batches)
        batches.close()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def write_shard(path: Path, images: dict[str, bytes]) -> Path:
    with ShardWriter(path) as writer:
        for key, data in images.items():
            writer.add(key, data, {"image_id": key})
    return path


def test_a_shard_without_images_is_refused(encoder: Encoder, shards: list[Path], tmp_path: Path) -> None:
    empty = write_shard(tmp_path / "00002.tar", {})
    with pytest.raises(CapstanError, match="00002.tar holds no image"):
        extract(encoder, [*shards, empty], tmp_path)
    assert list(read_batches([], 4)) == []


def test_an_image_that_cannot_be_decoded_ends_the_work(encoder: Encoder, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "00000.tar", {"00000000": jpeg(0), "00000001": jpeg(1, 200, 200)[:-100]})
    with pytest.raises(CapstanError, match="truncated image"):
        extract(encoder, [shard], tmp_path)
    assert not list(tmp_path.glob("*.h5"))


def test_features_beyond_float16_are_refused(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for beyond in (1e5, float("nan")):
        monkeypatch.setattr(extraction, "fuse_encoder", lambda *_, b=beyond: lambda pixels: torch.tensor([[[1.0, b]]]))
        shard = write_shard(tmp_path / "00000.tar", {"00000000": jpeg(0)})
        with pytest.raises(CapstanError, match="features beyond float16; use features.precision: fp32"):
            extract(encoder, [shard], tmp_path)
    monkeypatch.setattr(extraction, "fuse_encoder", lambda *_: lambda pixels: torch.tensor([[[-65504.0, 65504.0]]]))
    extract(encoder, [shard], tmp_path)
    assert open_features(tmp_path / "00000.h5").features.tolist() == [[[[-65504.0, 65504.0]]]]


def test_what_is_done_is_not_done_again_and_what_is_damaged_is(
    encoder: Encoder, shards: list[Path], tmp_path: Path
) -> None:
    extract(encoder, shards, tmp_path)
    assert extraction.missing_shards(encoder, shards, tmp_path) == []
    damaged = bytearray((tmp_path / "00000.h5").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "00000.h5").write_bytes(damaged)
    assert extraction.missing_shards(encoder, shards, tmp_path) == shards[:1]
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".h5"] == ["00001.h5"]


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("names", [["plain", "mirror", "top_left", "bottom_right_mirror"], list(VIEWS)])
def test_each_view_has_the_features_of_the_image_seen_so(
    encoder: Encoder, shards: list[Path], names: list[str], on_gpu: bool
) -> None:
    """8 at once: of two images all four views, or eight and four of one image's twelve."""
    if on_gpu:
        found = list(extraction._encode_on_gpu(encoder, shards[1:], 8, 0, torch.float32, names))
    else:
        found = list(encode_on_cpu(encoder, shards[1:], 8, torch.float32, names))
    assert [len(keys) for _, keys, _ in found] == ([2, 1] if len(names) == 4 else [1, 1, 1])
    features = np.concatenate([part for _, _, part in found])
    for number, name in enumerate(names):
        _, expected = expected_features(encoder, shards[1], name)
        np.testing.assert_allclose(features[:, number], expected, rtol=2e-3, atol=2e-3)
        assert number == 0 or not np.allclose(features[:, 0], expected, atol=0.05)


def test_views_are_kept_in_the_file_and_other_views_are_other_work(
    encoder: Encoder, shards: list[Path], tmp_path: Path
) -> None:
    extract_features(encoder, shards, tmp_path, "auto", 0, "fp32", ["plain", "mirror"])
    found = open_features(tmp_path / "00000.h5", verify=True)
    assert found.views == ["plain", "mirror"] and found.features.shape == (19, 2, 49, 1280)
    extract(encoder, shards, tmp_path / "plain")
    alone = open_features(tmp_path / "plain/00000.h5", verify=True)
    assert np.array_equal(found.features[:, 0], alone.features[:, 0]) and found.digest != alone.digest
    assert extraction.missing_shards(encoder, shards, tmp_path, ["plain", "mirror"]) == []
    for others in (["plain"], ["mirror", "plain"], ["plain", "center"]):
        assert extraction.missing_shards(encoder, shards, tmp_path, others) == shards


def test_images_are_counted_as_they_are_read(shards: list[Path], tmp_path: Path) -> None:
    assert [extraction.count_images(shard) for shard in shards] == [19, 3]
    content = shards[0].read_bytes()
    for damaged in (b"", content[:100], content[:5000], b"x" * 2000, content[:1024] + b"y" * 2000):
        (tmp_path / "damaged.tar").write_bytes(damaged)
        assert extraction.count_images(tmp_path / "damaged.tar") <= 19


def test_the_benchmarks_photographs_are_as_heavy_as_real_ones(tmp_path: Path) -> None:
    from benchmarks.extraction import write_shards

    jpegs = [data for shard in write_shards(tmp_path, 9) for _, data, _ in iterate_shard(shard)]
    assert len(set(jpegs)) == 9
    assert {decode_image(data).shape for data in jpegs} == {(256, 341, 3)}
    assert 0.25 < np.mean([len(data) for data in jpegs]) / (256 * 341) < 0.6  # bytes a pixel


@pytest.mark.parametrize(("num_threads", "ahead"), [(1, 1), (2, 64), (3, 2)])
def test_bytes_depend_on_no_number_of_threads_or_images_at_once(
    num_threads: int, ahead: int, encoder: Encoder, shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract_features(encoder, shards, tmp_path / "plain", 3, 0, "fp32")
    before = torch.get_num_threads()
    monkeypatch.setattr(extraction, "BATCHES_AHEAD", ahead)
    torch.set_num_threads(num_threads)
    try:
        extract_features(encoder, shards, tmp_path / "other", 32, 0, "fp32")
    finally:
        torch.set_num_threads(before)
    for shard in shards:
        name = f"{shard.stem}.h5"
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_a_number_format_that_the_processor_cannot_fuse_runs_as_it_is(
    encoder: Encoder, shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("mkldnn_reorder_conv2d_weight: fp16 path needs avx512_fp16")

    precision.can_fuse.cache_clear()
    monkeypatch.setattr(precision, "fuse", refuse)
    try:
        extract_features(encoder, shards[:1], tmp_path, 8, 0, "fp16")
    finally:
        precision.can_fuse.cache_clear()
    assert (tmp_path / f"{shards[0].stem}.h5").exists()


@pytest.mark.parametrize("wrong", [{"padding_mode": "reflect"}, {"padding": "same"}])
def test_a_convolution_that_computes_something_else_is_not_fused(wrong: dict) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, **{"padding": 1, **wrong}))
    with pytest.raises(ValueError, match="cannot be fused"):
        precision.fuse(network.eval(), torch.zeros(1, 3, 8, 8))


def test_a_convolution_used_twice_is_not_fused() -> None:
    convolution = torch.nn.Conv2d(4, 4, 3, padding=1)
    network = torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(4), convolution, torch.nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="cannot be fused"):
        precision.fuse(network.eval(), torch.zeros(1, 4, 8, 8))
