"""Gradient checkpointing: what a training step keeps, its peak and its time, with it and without: O(5 min) on 2 cores.

python -m benchmarks.recomputing                    all
python -m benchmarks.recomputing transformer        some; the others stay as they were measured
python -m benchmarks.recomputing --table            writes the table alone

Writes benchmarks/recomputing.json and the table in docs/training.md. A step is forward pass, loss and backward pass,
without the optimizer's, whose memory (two numbers a weight) does not change.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import in_turn, keep_row, read_rows
from benchmarks.pages import replace_table
from benchmarks.workload import ENCODER_DIM, VOCABULARY_SIZE, synthetic_batch
from captioning.decoders import DecoderConfig, build_decoder
from captioning.penalties import loss_sum

RESULTS = Path(__file__).with_suffix(".json")
BEGIN = "<!-- from benchmarks/recomputing.json: `python -m benchmarks.recomputing --table` -->"
NUM_IMAGES, REPEATS, MB = 16, 7, 1e6

RECURRENT: dict[str, Any] = {"embedding_dim": 512, "attention_dim": 512, "region_dim": 512}
DECODERS: dict[str, dict[str, Any]] = {
    "lstm, bahdanau": RECURRENT | {"type": "lstm", "attention": "bahdanau", "context_gate": True},
    "lstm, luong_general": RECURRENT | {"type": "lstm", "attention": "luong_general"},
    "lstm, luong_concat": RECURRENT | {"type": "lstm", "attention": "luong_concat"},
    "gru, luong_general, input feeding": RECURRENT
    | {"type": "gru", "attention": "luong_general", "input_feeding": True},
    "lstm, bahdanau, input feeding": RECURRENT
    | {"type": "lstm", "attention": "bahdanau", "context_gate": True, "input_feeding": True},
    "lstm, bahdanau, 64 images": RECURRENT | {"type": "lstm", "attention": "bahdanau", "context_gate": True},
    "transformer, 3 layers": {"type": "transformer", "num_layers": 3, "num_heads": 8, "feedforward_dim": 2048},
}
ENCODER = "efficientnet_lite0, live, all stages"
Step = Callable[[], Tensor]


def build_step(name: str, checkpointed: bool) -> tuple[torch.nn.Module, Step]:
    """What is trained, and a step that leaves its gradients."""
    torch.manual_seed(0)
    module, loss = build_live(checkpointed) if name == ENCODER else build_cached(name, checkpointed)

    def step() -> Tensor:
        module.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        value = loss()
        value.backward()
        return value.detach()

    return module, step


def build_cached(name: str, checkpointed: bool) -> tuple[torch.nn.Module, Step]:
    """16 or 64 images with 5 captions each of Flickr8k's lengths, 49 × 1280 features, float32."""
    sizes = {"vocabulary_size": VOCABULARY_SIZE, "encoder_dim": ENCODER_DIM, "hidden_dim": 512, "dropout": 0.3}
    decoder = build_decoder(DecoderConfig(**sizes | DECODERS[name]))
    decoder.checkpointed = checkpointed
    batch = synthetic_batch(64 if name.endswith("64 images") else NUM_IMAGES)
    return decoder, lambda: loss_sum(decoder, batch, 0.1, None) / batch.num_tokens


def build_live(checkpointed: bool) -> tuple[torch.nn.Module, Step]:
    """16 images of 224 px through an encoder that learns as a whole; its features' mean square stands for a decoder."""
    from captioning.encoders import build_encoder

    encoder = build_encoder("efficientnet_lite0", "random")
    encoder.unfreeze(encoder.stages)
    encoder.checkpointed = checkpointed
    pixels = torch.randint(0, 256, (NUM_IMAGES, 224, 224, 3), dtype=torch.uint8)
    return encoder, lambda: encoder(pixels).square().mean()


def allocated(work: Callable[[], object]) -> tuple[float, float]:
    """What torch's allocator holds more after the work than before, while its result lives, and the most in between:
    MB. All tensors count, also those that autograd's hooks do not see."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = work()
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    total = peak = 0
    for event in events:
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    del result
    return total / MB, peak / MB


def resident(name: str, checkpointed: bool) -> float:
    """The most resident memory of a fresh process during steps after its first, above what it has between them: MB."""
    command = [sys.executable, "-m", "benchmarks.recomputing", "--child", name, str(int(checkpointed))]
    return float(json.loads(subprocess.run(command, capture_output=True, check=True).stdout.splitlines()[-1]))


def child(name: str, checkpointed: bool) -> float:
    module, step = build_step(name, checkpointed)
    step()
    module.zero_grad(set_to_none=True)
    ctypes.CDLL(None).malloc_trim(0)  # what the first step left free is not counted as there before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / MB


def measure(name: str) -> dict[str, Any]:
    """Both ways: MB kept for the backward pass, peaks, time; and how far apart their gradients are."""
    ways = {"plain": False, "checkpointed": True}
    built = {way: build_step(name, checkpointed) for way, checkpointed in ways.items()}
    found: dict[str, Any] = {}
    gradients = {}
    for way, (module, step) in built.items():
        step()
        gradients[way] = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        module.zero_grad(set_to_none=True)
        peak = allocated(lambda step=step, module=module: (step(), module.zero_grad(set_to_none=True)))[1]
        found[way] = {"kept_mb": kept(name, ways[way]), "peak_mb": peak, "resident_mb": resident(name, ways[way])}
    times = in_turn({way: step for way, (_, step) in built.items()}, REPEATS)
    for way, values in times.items():
        found[way] |= values
    difference = (gradients["checkpointed"] - gradients["plain"]).norm() / gradients["plain"].norm()
    weights = sum(p.numel() * p.element_size() for p in built["plain"][0].parameters()) / MB
    return {**found, "weights_mb": weights, "difference_of_gradients": float(difference)}


def kept(name: str, checkpointed: bool) -> float:
    """MB that live between the forward and the backward pass."""
    torch.manual_seed(0)
    _, loss = build_live(checkpointed) if name == ENCODER else build_cached(name, checkpointed)
    loss()
    return allocated(loss)[0]


def build_table(rows: dict[str, Any]) -> str:
    """Markdown, a decoder a line: plain → checkpointed."""
    lines = [
        "| trained | weights, MB | kept for backward, MB | peak of a step, MB | resident peak | time, ms |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        plain, other = row["plain"], row["checkpointed"]
        cells = [f"{plain[k]:.0f} → {other[k]:.0f}" for k in ("kept_mb", "peak_mb", "resident_mb")]
        slower = other["median_s"] / plain["median_s"]
        cells.append(f"{plain['median_s'] * 1000:.0f} → {other['median_s'] * 1000:.0f} ({slower:.2f}×)")
        lines.append(f"| {name} | {row['weights_mb']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of rows' names; none: all")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child[0], args.child[1] == "1")))
        return
    every = [*DECODERS, ENCODER]
    for name in every if not args.table else ():
        if args.names and not name.startswith(tuple(args.names)):
            continue
        row = measure(name)
        keep_row(RESULTS, name, row, every)
        print(name, json.dumps({k: row[k] for k in ("plain", "checkpointed", "difference_of_gradients")}), flush=True)
    replace_table("docs/training.md", BEGIN, build_table(read_rows(RESULTS)))


if __name__ == "__main__":
    main()
