"""Out of memory: batches done again in halves, with the same result, on a CPU and on what a GPU runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback import jpeg
from torch import Tensor

from captioning import extraction
from captioning.encoders import Encoder, build_encoder
from captioning.errors import CapstanError
from captioning.extraction import encode_on_cpu
from captioning.memory import Fitting, is_out_of_memory
from captioning.shards import ShardWriter

CPU = torch.device("cpu")


def gpu_error() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")


def cpu_error() -> Exception:
    return RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you…"
    )


def parts_of(fitting: Fitting, num_images: int, limit: int, error: Callable[[], Exception] = gpu_error) -> list[int]:
    def work(parts: list[slice]) -> list[int]:
        lengths = [part.stop - part.start for part in parts]
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(num_images))
        if max(lengths) > limit:
            raise error()
        return lengths

    return fitting.run(work, num_images)


@pytest.mark.parametrize("error", [gpu_error, cpu_error, MemoryError])
def test_halved_until_it_fits_and_so_from_then_on(error, capsys: pytest.CaptureFixture[str]) -> None:
    fitting = Fitting(64, CPU)
    if error is MemoryError:
        error = lambda: MemoryError("no memory")  # noqa: E731
    assert parts_of(fitting, 50, 15, error) == [12, 12, 12, 12, 2]
    assert fitting.num_images == 12
    assert capsys.readouterr().out.splitlines() == [
        "out of memory with 50 images at once: 25 from here on",
        "out of memory with 25 images at once: 12 from here on",
    ]
    assert parts_of(fitting, 30, 15) == [12, 12, 6] and parts_of(fitting, 5, 15) == [5]
    assert capsys.readouterr().out == ""


def test_what_really_is_too_much_for_a_cpu_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(KeyError("out of memory"))


def test_other_errors_pass_and_one_image_that_is_too_much_is_the_users_to_know() -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"):
        parts_of(Fitting(8, CPU), 8, 4, lambda: RuntimeError("shape mismatch"))
    with pytest.raises(CapstanError, match=r"out of memory with a single image \(CUDA out of memory.*2.00 GiB\)"):
        parts_of(Fitting(8, CPU), 8, 0)


def test_threads_that_fail_together_halve_once() -> None:
    fitting, together = Fitting(8, CPU), threading.Barrier(4)
    threading.excepthook, hook = lambda args: found.append([str(args.exc_value)]), threading.excepthook
    found: list[list[object]] = []

    def run() -> None:
        def work(parts: list[slice]) -> list[object]:
            if len(parts) == 1:
                together.wait()
                raise gpu_error()
            return [part.stop - part.start for part in parts]

        found.append(fitting.run(work, 8))

    threads = [threading.Thread(target=run) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.excepthook = hook
    assert found == [[4, 4]] * 4 and fitting.num_images == 4


def test_a_failed_calls_tensors_are_free_when_it_is_tried_again() -> None:
    import weakref

    alive: list[weakref.ref[Tensor]] = []

    def work(parts: list[slice]) -> bool:
        if len(parts) == 1:
            kept = torch.zeros(10)
            alive.append(weakref.ref(kept))
            raise gpu_error()
        return alive[0]() is None

    assert Fitting(4, CPU).run(work, 4)


# Extraction


class Small(Encoder):
    """An encoder that has memory for `limit` images, and keeps how many it was given."""

    limit, error = 3, staticmethod(gpu_error)

    def forward(self, pixels: Tensor) -> Tensor:
        self.given.append(len(pixels))
        if len(pixels) > self.limit:
            raise self.error()
        return super().forward(pixels)


@pytest.fixture
def encoder() -> Encoder:
    built = build_encoder("efficientnet_lite0", "package")
    built.__class__, built.given = Small, []
    return built


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder / "00000.tar") as writer:
        for number in range(11):
            writer.add(f"{number:08d}", jpeg(number), {})
    return [folder / "00000.tar"]


def features_of(found: list[extraction.Encoded]) -> np.ndarray:
    assert [key for _, keys, _ in found for key in keys] == [f"{i:08d}" for i in range(11)]
    return np.concatenate([features for _, _, features in found])


@pytest.mark.parametrize("error", [gpu_error, cpu_error])
@pytest.mark.parametrize("views", [["plain"], ["plain", "mirror", "center"]])
def test_a_cpu_short_of_memory_gives_the_same_bits(
    encoder: Encoder, shards: list[Path], error, views: list[str], monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extraction, "can_fuse", lambda dtype: False)
    monkeypatch.setattr(Small, "error", staticmethod(error))
    found = features_of(list(encode_on_cpu(encoder, shards, "auto", torch.float32, views)))
    assert max(encoder.given) > 3 >= encoder.given[-1]
    assert "images at once: 3 from here on" in (said := capsys.readouterr().out) or "2 from here on" in said
    monkeypatch.setattr(Small, "limit", 99)
    assert np.array_equal(found, features_of(list(encode_on_cpu(encoder, shards, 8, torch.float32, views))))


@pytest.mark.parametrize("views", [["plain"], ["plain", "mirror", "center"]])
def test_a_gpu_is_tried_before_the_first_image(
    encoder: Encoder, shards: list[Path], views: list[str], monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So the parts are those of the machine, and not of whichever shard a resumed run begins with."""
    monkeypatch.setattr(extraction, "GPU_BATCH_SIZE", 16)
    found = features_of(list(extraction._encode_on_gpu(encoder, shards, "auto", 0, torch.float32, views)))
    assert encoder.given[:11] == [16, 8, 4, *[2] * 8] and max(encoder.given[11:]) == 2
    assert capsys.readouterr().out.count("from here on") == 3
    monkeypatch.setattr(Small, "limit", 99)
    plain = features_of(list(extraction._encode_on_gpu(encoder, shards, 12, 0, torch.float32, views)))
    np.testing.assert_allclose(found, plain, rtol=2e-3, atol=2e-3)  # other batches, other last digits
    assert list(extraction._encode_on_gpu(encoder, [], "auto", 0, torch.float32)) == []


def test_a_gpus_given_number_is_halved_too(encoder: Encoder, shards: list[Path], monkeypatch) -> None:
    found = features_of(list(extraction._encode_on_gpu(encoder, shards, 10, 0, torch.float32)))
    assert encoder.given == [10, 5, 2, 2, 2, 2, 2, 1]
    monkeypatch.setattr(Small, "limit", 99)
    plain = features_of(list(extraction._encode_on_gpu(encoder, shards, 4, 0, torch.float32)))
    np.testing.assert_allclose(found, plain, rtol=2e-3, atol=2e-3)


def test_an_encoder_for_which_one_image_is_too_much_ends_the_work(encoder: Encoder, shards, monkeypatch) -> None:
    monkeypatch.setattr(extraction, "can_fuse", lambda dtype: False)
    monkeypatch.setattr(Small, "limit", 0)
    for encode in (
        lambda: encode_on_cpu(encoder, shards, "auto", torch.float32),
        lambda: extraction._encode_on_gpu(encoder, shards, "auto", 0, torch.float32),
    ):
        with pytest.raises(CapstanError, match="out of memory with a single image"):
            list(encode())
