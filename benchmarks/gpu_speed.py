"""How fast a GPU trains, encodes and searches, beside what it can multiply and copy; a part of `benchmarks.gpu`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.training import product_shapes
from benchmarks.workload import build, synthetic_batch
from captioning.beam_search import beam_search
from captioning.datasets import Batch
from captioning.distributed import ALONE
from captioning.encoders import build_encoder
from captioning.optimization import Stepper, build_adamw
from captioning.precision import autocast

REPEATS = 10


def seconds(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Median of `repeats` runs after three to warm up, each waited for."""
    found = []
    for run in range(repeats + 3):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if run >= 3:
            found.append(time.perf_counter() - started)
    return statistics.median(found)


def measure_limits(device: torch.device) -> dict[str, float]:
    """TFLOP/s of large square products, and GB/s of copies: the roofline, as this device gives it."""
    size = 8192 if device.type == "cuda" else 512
    limits = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        limits[f"{name} TFLOP/s"] = 2 * size**3 / seconds(lambda a=left, b=right: a @ b, device) / 1e12
    source = torch.empty(size * size * 4, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    limits["device memory GB/s"] = 2 * source.numel() / seconds(lambda: target.copy_(source), device) / 1e9
    if device.type == "cuda":
        for name, host in (("pageable", source.cpu()), ("pinned", source.cpu().pin_memory())):
            copy = seconds(lambda h=host: target.copy_(h, non_blocking=True), device)
            limits[f"host to device, {name}, GB/s"] = source.numel() / copy / 1e9
    return limits


def measure_steps(device: torch.device, sizes: tuple[int, ...], limits: dict[str, float]) -> list[dict[str, Any]]:
    """P1's decoder in training: captions/s, the share of the measured roofline, and the memory at its peak."""
    rows = []
    for num_images in sizes:
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            decoder = build().to(device)
            batch = synthetic_batch(num_images)
            flops = 3 * 2 * sum(rows * inner * columns for rows, inner, columns in product_shapes(decoder, batch))
            stepper = Stepper(
                build_adamw([(list(decoder.named_parameters()), 1e-4)], 0.01, (0.9, 0.999)), 5.0, dtype, ALONE
            )
            moved = batch.to(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            taken = seconds(lambda d=decoder, b=moved, t=dtype, s=stepper: s.step(_loss(d, b, t), 1.0), device)
            row = {
                "images": num_images,
                "precision": name,
                "step ms": taken * 1000,
                "captions/s": 5 * num_images / taken,
                "share of the products' roofline": flops / taken / 1e12 / limits[f"{name} TFLOP/s"],
                "transfer ms": seconds(lambda b=batch: b.to(device), device) * 1000,
            }
            if device.type == "cuda":
                row["peak MB"] = torch.cuda.max_memory_allocated() / 1e6
                row["step ms as a CUDA graph"] = _graphed(decoder, moved, dtype, device) * 1000
            rows.append(row)
    return rows


def _loss(decoder: torch.nn.Module, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    with autocast(batch.features.device, dtype):
        logits = decoder(batch)
    return torch.nn.functional.cross_entropy(logits.float(), batch.packed_targets)


def _graphed(decoder: torch.nn.Module, batch: Batch, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of forward and backward, recorded once and replayed: what launching kernels costs is what this saves."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            _loss(decoder, batch, dtype).backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    decoder.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        _loss(decoder, batch, dtype).backward()
    return seconds(graph.replay, device)


def measure_search(device: torch.device, num_images: int) -> dict[str, float]:
    """Beam 5, at most 20 words, by precision: images/s."""
    decoder = build().to(device).eval()
    with torch.no_grad():
        decoder.output.weight.mul_(20)  # an untrained model is indifferent; a trained one is not
    features = synthetic_batch(num_images).features.to(device)
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):

        def search(dtype: torch.dtype = dtype) -> None:
            with autocast(device, dtype):
                beam_search(decoder, features, 5, 20)

        found[f"{name} images/s"] = num_images / seconds(search, device, repeats=3)
    return found


def measure_encoders(device: torch.device, batch_size: int) -> dict[str, dict[str, float]]:
    """Images/s of the networks on pixels that are on the device, by precision; random weights."""
    found: dict[str, dict[str, float]] = {}
    for name in ("efficientnet_lite0", "resnet50"):
        encoder = build_encoder(name, "random").to(device)
        side = encoder.transform.image_px
        pixels = torch.randint(0, 256, (batch_size, side, side, 3), dtype=torch.uint8, device=device)
        found[name] = {}
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):

            def encode(encoder: Any = encoder, pixels: Any = pixels, dtype: torch.dtype = dtype) -> None:
                with torch.inference_mode(), autocast(device, dtype):
                    encoder(pixels)

            found[name][f"{precision} images/s"] = batch_size / seconds(encode, device)
    return found


def measure_speed(device: torch.device) -> dict[str, Any]:
    """All of this module; on a CPU with sizes that only try the script."""
    large = device.type == "cuda"
    limits = measure_limits(device)
    return {
        "limits": limits,
        "training steps": measure_steps(device, (16, 64, 256, 1024) if large else (2,), limits),
        "search": measure_search(device, 512 if large else 2),
        "encoders": measure_encoders(device, 256 if large else 1),
    }
