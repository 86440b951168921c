"""Measures training, search and loading beside peers and limits: `make bench`.

Writes benchmarks/results.json and prints a table. Synthetic features and captions with Flickr8k's caption lengths.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import in_turn, machine, ratio
from benchmarks.references.tutorial import tutorial_beam_search, tutorial_loss
from captioning.beam_search import beam_search
from captioning.datasets import Batch, FeatureStore, collate
from captioning.decoders import Decoder, DecoderConfig, build_decoder
from captioning.feature_files import write_features
from captioning.vocabulary import Vocabulary

RESULTS = Path(__file__).parent / "results.json"
NUM_REGIONS, ENCODER_DIM, VOCABULARY_SIZE = 49, 1280, 2500
Row = dict[str, Any]


def synthetic_batch(num_images: int) -> Batch:
    """Five captions an image with the lengths of Flickr8k's: mean 10.8, standard deviation 3.8."""
    draw = random.Random(0)
    captions = [
        [
            [draw.randrange(4, VOCABULARY_SIZE) for _ in range(min(23, max(2, round(draw.gauss(10.8, 3.8)))))]
            for _ in range(5)
        ]
        for _ in range(num_images)
    ]
    features = torch.randn(num_images, NUM_REGIONS, ENCODER_DIM, generator=torch.Generator().manual_seed(0)).relu()
    return collate(features, captions, Vocabulary)


def build(attention: str = "bahdanau") -> Decoder:
    torch.manual_seed(0)
    return build_decoder(DecoderConfig("lstm", attention, VOCABULARY_SIZE, ENCODER_DIM, 512, 512, 512, 512, 0.0))


def product_shapes(decoder: Any, batch: Batch) -> list[tuple[int, int, int]]:
    """(rows, inner, columns) of the matrix products that one forward pass cannot do without."""
    running = sum(rows * columns for rows, columns in batch.extents)
    images, config = len(batch.features), decoder.config
    hidden, region, gates = config.hidden_dim, decoder.region_dim, 4 * config.hidden_dim
    return [
        (images * NUM_REGIONS, ENCODER_DIM, region),
        (images * NUM_REGIONS, region, config.attention_dim),
        (batch.num_tokens, config.embedding_dim, gates),
        *[(r * c, hidden, gates + config.attention_dim + region) for r, c in batch.extents],
        *[(r * c, region, gates) for r, c in batch.extents],
        (running, NUM_REGIONS, region),
        (batch.num_tokens, hidden + region, hidden),
        (batch.num_tokens, hidden, VOCABULARY_SIZE),
    ]


def measure_training() -> Row:
    """P1: a training step beside the tutorials' and beside its matrix products alone."""
    batch, decoder = synthetic_batch(16), build()
    operands = [(torch.randn(m, k), torch.randn(k, n), torch.randn(m, n)) for m, k, n in product_shapes(decoder, batch)]

    def step(loss: Any) -> Tensor:
        decoder.zero_grad()
        value = loss()
        value.backward()
        return value.detach()

    def ours() -> Tensor:
        return step(lambda: torch.nn.functional.cross_entropy(decoder(batch), batch.packed_targets))

    def tutorial() -> Tensor:
        return step(lambda: tutorial_loss(decoder, batch))  # type: ignore[arg-type]

    def products() -> None:
        for left, right, gradient in operands:  # forward, and the two of backward
            _ = left @ right, gradient @ right.T, left.T @ gradient

    difference = abs(float(ours()) - float(tutorial()))
    times = in_turn({"ours": ours, "tutorial": tutorial, "products alone": products}, repeats=5)
    return {
        "work": "P1 training step, LSTM + Bahdanau, 16 × 5 captions, fp32",
        "times": times,
        "ratios": {
            "tutorial / ours": ratio(times, "tutorial", "ours"),
            "ours / products": ratio(times, "ours", "products alone"),
        },
        "check": {"difference of losses": difference},
    }


def measure_search(num_images: int = 40) -> Row:
    """P2: beam 5 in batches, beside one image at a time; the tutorials' scripts do that five times an image."""
    decoder = build().eval()
    with torch.no_grad():
        decoder.output.weight.mul_(20)  # an untrained model is indifferent; a trained one is not
    features = synthetic_batch(num_images).features

    def ours() -> list[list[int]]:
        return [hypothesis.token_ids for hypothesis in beam_search(decoder, features, 5, 20)]

    def one_by_one() -> list[list[int]]:
        return tutorial_beam_search(decoder, features, 5, 20)  # type: ignore[arg-type]

    same = sum(a == b for a, b in zip(ours(), one_by_one(), strict=True))
    times = in_turn({"ours": ours, "one image at a time": one_by_one}, repeats=3)
    single = ratio(times, "one image at a time", "ours")
    return {
        "work": f"P2 beam 5, {num_images} images, at most 20 words, fp32",
        "times": times,
        "ratios": {"one image at a time / ours": single, "tutorial (once a reference) / ours": 5 * single},
        "check": {"identical captions": f"{same}/{num_images}"},
    }


def measure_loading(num_images: int = 2000, batch_size: int = 64) -> Row:
    """P6: random batches from the feature cache, beside copying as many bytes from the page cache."""
    from types import SimpleNamespace

    with tempfile.TemporaryDirectory() as folder:
        values = np.random.default_rng(0).normal(size=(num_images, NUM_REGIONS, ENCODER_DIM)).astype(np.float16)
        keys = [f"{i:08d}" for i in range(num_images)]
        write_features(Path(folder) / "0.h5", keys, values, {}, "")
        store = FeatureStore(Path(folder), [SimpleNamespace(image_id=k, shard="0", key=k) for k in keys])
        order = np.random.default_rng(1).permutation(num_images).tolist()
        parts = [order[i : i + batch_size] for i in range(0, num_images, batch_size)]
        mapped = np.memmap(Path(folder) / "0.h5", np.uint8, "r")

        def gather() -> None:
            for part in parts:
                store.gather(part)

        def copy() -> None:
            for start in range(0, len(mapped), len(mapped) // len(parts)):
                np.array(mapped[start : start + len(mapped) // len(parts)])

        times = in_turn({"gather": gather, "copy": copy}, repeats=5)
    return {
        "work": f"P6 {num_images} images in random batches of {batch_size}, float16 on disk to float32 tensors",
        "times": times,
        "ratios": {"share of a plain copy's speed": ratio(times, "copy", "gather")},
        "check": {},
    }


def main() -> None:
    from benchmarks.checkpointing import measure_checkpoints

    def measure_default_checkpoints() -> Row:
        return measure_checkpoints(32, default_run=True)

    checkpoints = (measure_checkpoints, measure_default_checkpoints)
    rows = []
    for measure in (measure_training, measure_search, *checkpoints, measure_loading):
        row = measure()
        rows.append(row)
        print(row["work"])
        for name, time in row["times"].items():
            spread = f"{time['min_s'] * 1000:.1f} to {time['max_s'] * 1000:.1f}"
            print(f"  {name:24} {time['median_s'] * 1000:9.1f} ms  ({spread})")
        for name, value in {**row["ratios"], **row["check"]}.items():
            print(f"  {name:34} {value:.3g}" if isinstance(value, float) else f"  {name:34} {value}")
    RESULTS.write_text(json.dumps({"machine": machine(), "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
