"""P6 and P9: batches from the feature cache, their speed and their memory: `python -m benchmarks.loading`."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks.measure import Row, in_turn, ratio, show
from benchmarks.workload import ENCODER_DIM, NUM_REGIONS, VOCABULARY_SIZE
from captioning.annotations import Annotation
from captioning.datasets import CaptionBatches, FeatureStore, epoch_order
from captioning.decoders import DecoderConfig, build_decoder
from captioning.feature_files import open_features, write_features
from captioning.vocabulary import SPECIAL, Vocabulary

LIMIT_MB = 1536
IMAGES_PER_FILE = 2000


WORDS = [f"word{i}" for i in range(VOCABULARY_SIZE - len(SPECIAL))]


def annotate(num_images: int) -> list[Annotation]:
    """Images in shards of `IMAGES_PER_FILE`, each with a caption of ten words."""
    return [
        Annotation(
            image_id=f"{i:08d}",
            source="benchmark",
            split="train",
            shard=f"{i // IMAGES_PER_FILE:05d}",
            key=f"{i:08d}",
            captions=[" ".join(WORDS[(i * 7 + j * 11) % len(WORDS)] for j in range(10))],
        )
        for i in range(num_images)
    ]


def write_cache(folder: Path, annotations: list[Annotation]) -> None:
    """Feature files of random numbers for these images."""
    draw = np.random.default_rng(0)
    shape = (min(len(annotations), IMAGES_PER_FILE), NUM_REGIONS, ENCODER_DIM)
    values = draw.normal(size=shape).astype(np.float16)
    for start in range(0, len(annotations), IMAGES_PER_FILE):
        part = annotations[start : start + IMAGES_PER_FILE]
        write_features(folder / f"{part[0].shard}.h5", [a.key for a in part], values[: len(part)], {}, "")


def measure_loading(num_images: int = 2000, batch_size: int = 64) -> Row:
    """P6: random batches from the feature cache, beside copying as many bytes from the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        annotations = annotate(num_images)
        write_cache(Path(folder), annotations)
        store = FeatureStore(Path(folder), annotations)
        order = np.random.default_rng(1).permutation(num_images).tolist()
        parts = [order[i : i + batch_size] for i in range(0, num_images, batch_size)]
        mapped = np.memmap(Path(folder) / "00000.h5", np.uint8, "r")

        def gather() -> None:
            for part in parts:
                store.gather(part)

        def copy() -> None:
            for start in range(0, len(mapped), len(mapped) // len(parts)):
                np.array(mapped[start : start + len(mapped) // len(parts)])

        times = in_turn({"gather": gather, "copy": copy}, repeats=5)
    return {
        "work": f"P6 {num_images} images in random batches of {batch_size}, float16 in HDF5 to tensors",
        "times": times,
        "ratios": {"share of a plain copy's speed": ratio(times, "copy", "gather")},
        "check": {},
    }


def measure_memory() -> Row:
    """P9: an epoch on a cache three times as large as the memory that the process may have, beside reading it whole."""
    num_images = 3 * LIMIT_MB * 2**20 // (NUM_REGIONS * ENCODER_DIM * 2)
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder), annotate(num_images))
        found = {}
        for how in ("train", "read"):
            command = [sys.executable, "-m", "benchmarks.loading", how, folder, str(num_images)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[how] = json.loads(done.stdout)
    trained = found["train"]
    return {
        "work": f"P9 an epoch of {num_images} images, {3 * LIMIT_MB} MB of features, RLIMIT_DATA of {LIMIT_MB} MB",
        "times": {},
        "ratios": {
            "own memory at the end / after the first tenth": trained["last_mb"] / trained["first_mb"],
            "cache / own memory at its peak": 3 * LIMIT_MB / trained["peak_mb"],
        },
        "check": {"own memory in MB": round(trained["peak_mb"]), "reading it whole": found["read"]["end"]},
    }


def _train(folder: Path, num_images: int) -> dict[str, float]:
    """One epoch of a small decoder; its own (anonymous) memory in MB as it goes."""
    annotations = annotate(num_images)
    vocabulary = Vocabulary([*SPECIAL, *WORDS], max_length=20)
    batches = CaptionBatches(FeatureStore(folder, annotations), annotations, vocabulary, 64)
    decoder = build_decoder(
        DecoderConfig(
            type="lstm",
            attention="bahdanau",
            context_gate=True,
            vocabulary_size=VOCABULARY_SIZE,
            encoder_dim=ENCODER_DIM,
            embedding_dim=32,
            hidden_dim=32,
            attention_dim=32,
            region_dim=32,
            dropout=0.0,
        )
    )
    optimizer = torch.optim.AdamW(decoder.parameters())
    used = []
    for share in batches.epoch(epoch_order(num_images, 0, 0)):
        assert share.batch is not None
        torch.nn.functional.cross_entropy(decoder(share.batch), share.batch.packed_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        used.append(_own_mb())
    tenth = len(used) // 10
    means = {"first_mb": float(np.mean(used[tenth : 2 * tenth])), "last_mb": float(np.mean(used[-tenth:]))}
    return {**means, "peak_mb": max(used)}


def _read(folder: Path) -> dict[str, str]:
    """What a loader that reads all features at its start meets."""
    try:
        kept = [np.array(open_features(path).features) for path in sorted(folder.glob("*.h5"))]
    except MemoryError:
        return {"end": "MemoryError"}
    return {"end": f"{len(kept)} files read"}


def _own_mb() -> float:
    """Anonymous memory; pages of the cache belong to the kernel, which takes them back as it likes."""
    memory = psutil.Process().memory_info()
    return float(memory.rss - memory.shared) / 2**20


def main() -> None:
    if len(sys.argv) == 1:
        show(measure_loading())
        show(measure_memory())
        return
    how, folder, num_images = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_MB * 2**20,) * 2)  # private writable memory, touched or not
    print(json.dumps(_train(folder, num_images) if how == "train" else _read(folder)))


if __name__ == "__main__":
    main()
