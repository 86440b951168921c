"""Ways to run one frozen encoder on a CPU, side by side: O(4 min) on 2 cores.

python -m benchmarks.networks                                   what is installed
pip install onnx onnxruntime openvino && python -m benchmarks.networks      all
python -m benchmarks.networks --table                           writes the table alone

Why P3's network is the one it is. Writes benchmarks/networks.json and a table in docs/performance.md. What a way needs
and is not installed is left out; none of it is a dependency of the project.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import io
import json
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.extraction import photographs
from benchmarks.measure import in_turn, machine
from benchmarks.pages import replace_table
from captioning.encoders import Encoder, build_encoder, fuse_encoder
from captioning.precision import keep_memory

RESULTS = Path(__file__).with_suffix(".json")
BEGIN = "<!-- from benchmarks/networks.json: `python -m benchmarks.networks --table` -->"
ENCODER, NUM_IMAGES, AT_ONCE, PER_CORE, REPEATS = "efficientnet_lite0", 64, 32, 8, 7
BF16 = torch.bfloat16
Run = Callable[[], Tensor]
"""All images' feature maps or regions."""


class Ways:
    """The encoder's network on the same pixels, by name."""

    def __init__(self, encoder: Encoder) -> None:
        size = encoder.transform.image_px
        self.pixels = torch.from_numpy(np.stack([np.asarray(i) for i in photographs(NUM_IMAGES, size, size)]))
        images = encoder.transform.normalise(self.pixels)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.encoder, self.network = encoder, encoder.backbone.to(memory_format=torch.channels_last)
        self.pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))

    def eager(self, dtype: torch.dtype) -> Run:
        network, images = copy.deepcopy(self.network).to(dtype), self.images.to(dtype)
        return lambda: torch.cat([network(part) for part in images.split(AT_ONCE)])

    def fused(self, dtype: torch.dtype, by_core: bool) -> Run:
        """Ours: all threads on one batch, or (as feature extraction has it) a batch on each core."""
        fused = fuse_encoder(self.encoder, PER_CORE, dtype)
        parts = self.pixels.split(PER_CORE)

        @torch.inference_mode()
        def encode(part: Tensor) -> Tensor:
            return fused(part)

        def run() -> Tensor:
            regions = torch.cat(list((self.pool.map if by_core else map)(encode, parts)))
            return regions.transpose(1, 2).reshape(NUM_IMAGES, -1, *self.encoder.grid)

        return run

    def compiled(self, dtype: torch.dtype) -> Run:
        """Inductor with frozen weights: it folds and lays out as we do, and makes C++ of the rest."""
        import torch._inductor.config as inductor

        inductor.freezing, inductor.compile_threads = True, 1
        compiled = torch.compile(copy.deepcopy(self.network).to(dtype))
        images = self.images.to(dtype)
        return lambda: torch.cat([compiled(part) for part in images.split(AT_ONCE)])

    def onnx_runtime(self) -> Run:
        import onnxruntime

        file = io.BytesIO()
        example = self.images[:AT_ONCE].contiguous()
        torch.onnx.export(copy.deepcopy(self.network), (example,), file, dynamo=False, opset_version=17)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
        name, parts = session.get_inputs()[0].name, [p.contiguous().numpy() for p in self.images.split(AT_ONCE)]
        return lambda: torch.from_numpy(np.concatenate([session.run(None, {name: part})[0] for part in parts]))

    def openvino(self, hint: str) -> Run:
        """Throughput mode: streams of its own side by side."""
        import openvino

        example = self.images[:PER_CORE]
        model = openvino.convert_model(copy.deepcopy(self.network), example_input=example, input=[[*example.shape]])
        settings = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "THROUGHPUT"}
        compiled = openvino.Core().compile_model(
            model, "CPU", settings | {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        )
        queue, parts = openvino.AsyncInferQueue(compiled), [p.contiguous().numpy() for p in self.images.split(PER_CORE)]
        found: dict[int, Any] = {}
        queue.set_callback(lambda request, i: found.__setitem__(i, request.get_output_tensor(0).data.copy()))

        def run() -> Tensor:
            for i, part in enumerate(parts):
                queue.start_async({0: part}, i)
            queue.wait_all()
            return torch.from_numpy(np.concatenate([found[i] for i in range(len(parts))]))

        return run

    def all(self) -> dict[str, Callable[[], Run]]:
        return {
            "eager, channels_last, fp32": lambda: self.eager(torch.float32),
            "ours, all threads on a batch, fp32": lambda: self.fused(torch.float32, False),
            "ours, a batch on each core, fp32": lambda: self.fused(torch.float32, True),
            "torch.compile, freezing, fp32": lambda: self.compiled(torch.float32),
            "ONNX Runtime, fp32": self.onnx_runtime,
            "OpenVINO, throughput, fp32": lambda: self.openvino("f32"),
            "eager, channels_last, bf16": lambda: self.eager(BF16),
            "ours, all threads on a batch, bf16": lambda: self.fused(BF16, False),
            "ours, a batch on each core, bf16": lambda: self.fused(BF16, True),
            "torch.compile, freezing, bf16": lambda: self.compiled(BF16),
            "OpenVINO, throughput, bf16": lambda: self.openvino("bf16"),
        }


def measure() -> dict[str, Any]:
    """Images/s of each way, and how far its features are from eager float32's: greatest, and relative norm."""
    encoder = build_encoder(ENCODER, "package")
    ways = Ways(encoder)
    runs: dict[str, Run] = {}
    apart: dict[str, list[float]] = {}
    with torch.no_grad():  # freezing does nothing in inference mode
        expected = encoder.backbone(ways.images)
        for name, build in ways.all().items():
            try:
                runs[name] = build()
                found = runs[name]().float()
            except ImportError as error:
                print(f"{name}: left out, {error}", flush=True)
                runs.pop(name, None)
                continue
            difference = found - expected
            apart[name] = [float(difference.abs().max()), float(difference.norm() / expected.norm())]
        times = in_turn(runs, REPEATS)
    return {name: {**times[name], "differences": apart[name]} for name in runs}


def build_table(rows: dict[str, Any]) -> str:
    lines = ["| way | images/s | greatest difference | relative norm |", "|:--|--:|--:|--:|"]
    for name, row in rows.items():
        greatest, relative = row["differences"]
        lines.append(f"| {name} | {NUM_IMAGES / row['median_s']:.0f} | {greatest:.1e} | {relative:.1e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.table:
        warnings.simplefilter("ignore")
        keep_memory()
        about = {"date": datetime.date.today().isoformat(), "machine": machine()}
        RESULTS.write_text(json.dumps({**about, "results": measure()}, indent=1) + "\n")
    table = build_table(json.loads(RESULTS.read_text())["results"])
    print(table)
    replace_table("docs/performance.md", BEGIN, table)


if __name__ == "__main__":
    main()
