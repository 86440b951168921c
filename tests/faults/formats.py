"""Every file format that the project writes, small: how to make one, and how the stages read it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from loopback import jpeg

from captioning import attention_maps, checkpoints, feature_files, models, paths, shards, storage, tracked
from captioning.annotations import Annotation, ImageRecord, dump_annotations, load_annotations, load_images
from captioning.decoders import DecoderConfig, build_decoder
from captioning.tensor_files import SharedBuffer, copy_tensors, split_tree
from captioning.vocabulary import SPECIAL, Vocabulary

NUM_IMAGES = 6


@dataclass(frozen=True)
class Format:
    """`make` writes a file or folder below the working directory and returns it; `read` gives what comparison needs."""

    make: Callable[[], Path]
    read: Callable[[Path], Any]
    """Raises CapstanError where it refuses; None: set aside, to be made anew."""
    damaged: str = "*"
    """Pattern of the files to damage, where `make` gives a folder."""


def _row(number: int, image: bytes) -> shards.LedgerRow:
    key, digest = f"{number:08d}", shards.digest_bytes(image)
    place = ("00000", key, 40, 30, digest)
    return shards.LedgerRow(f"s/{number}", "s", "train", "file:///x", shards.SUCCESS, "", *place, ["a dog"], "[]")


def make_shards() -> Path:
    folder = paths.SHARDS
    folder.mkdir(parents=True)
    rows = []
    with shards.ShardWriter(folder / "00000.tar") as writer:
        for number in range(NUM_IMAGES):
            image = jpeg(number)
            rows.append(_row(number, image))
            writer.add(rows[-1].key or "", image, {"image_id": rows[-1].image_id})
    digest = storage.digest_file(folder / "00000.tar")
    shards.write_ledger(folder / paths.LEDGER.name, rows, {shards.TARS: json.dumps({"00000": digest})})
    return folder


def read_shards(folder: Path) -> Any:
    shards.verify_shards(folder, ["00000"])
    return list(shards.iterate_shard(folder / "00000.tar"))


def read_ledger(folder: Path) -> Any:
    return shards.read_ledger(folder / paths.LEDGER.name)


def make_features() -> Path:
    path = paths.FEATURES / "encoder" / "00000.h5"
    features = np.random.default_rng(0).standard_normal((NUM_IMAGES, 2, 4, 8)).astype(np.float16)
    encoder, views = {"name": "encoder", "grid": [2, 2]}, ["plain", "mirror"]
    feature_files.write_features(path, [f"{n:08d}" for n in range(NUM_IMAGES)], features, encoder, "ab12", views)
    return path


def read_features(path: Path) -> Any:
    found = feature_files.open_features(path, verify=True)
    return found.keys, found.views, found.features.tobytes(), found.features.shape, found.encoder, found.shard_digest


def make_attention() -> Path:
    path = paths.attention("encoder-decoder")
    path.parent.mkdir(parents=True)
    weights = np.full((3, 4), 0.25)
    words = ["a", "dog", "<eos>"]
    attention_maps.write_attention_maps(path, (2, 2), [(f"s/{n}", words, weights) for n in range(NUM_IMAGES)])
    return path


def read_attention(path: Path) -> Any:
    found = attention_maps.load_attention_maps(path)
    return found.grid, found.image_ids, found.tokens, found.offsets.tobytes(), found.weights.tobytes()


def make_checkpoint() -> Path:
    target = Path(".work/train/fingerprint/checkpoints/step-00000050")
    generator = torch.Generator().manual_seed(0)
    state = {"weights": {"w": torch.rand(20, 8, generator=generator)}, "position": {"step": 50, "loss": 0.5}}
    plain, tensors = split_tree(state)
    buffer = SharedBuffer()
    num_bytes = copy_tensors(tensors, buffer)
    with storage.commit(target, {"fingerprint": "fingerprint", "step": 50, "epoch": 1}) as files:
        files.write(checkpoints.TENSORS, bytes(buffer.bytes[:num_bytes].numpy()))
        files.write(checkpoints.PLAIN, storage.dump_json(plain))
        files.write(checkpoints.JOURNAL, b'{"step": 1, "metrics": {"loss": 0.5}}\n')
    return target


def read_checkpoint(folder: Path) -> Any:
    found = checkpoints.read_checkpoint(folder, "fingerprint")
    weights = found.state["weights"]["w"].numpy().tobytes()
    return found.step, found.epoch, weights, found.state["position"], found.journal


def make_part() -> Path:
    path = Path(".work/generate/fingerprint/parts/00000.jsonl")
    storage.write_part(path, [{"image_id": f"s/{n}", "token_ids": [n, 2]} for n in range(NUM_IMAGES)], ["s/0"])
    return path


def read_part(path: Path) -> Any:
    return storage.read_part(path, ["s/0"])


def make_model() -> Path:
    folder = paths.model("encoder-decoder")
    vocabulary = Vocabulary([*SPECIAL, "a", "dog"], 4)
    config = DecoderConfig(
        type="lstm",
        attention="bahdanau",
        context_gate=True,
        vocabulary_size=len(vocabulary),
        encoder_dim=8,
        embedding_dim=4,
        hidden_dim=4,
        attention_dim=4,
        region_dim=4,
        dropout=0.0,
    )
    weights = {"w": torch.arange(6.0)}
    encoder = SimpleNamespace(state_dict=lambda: weights, describe=lambda: {"name": "encoder", "grid": [2, 2]})
    torch.manual_seed(0)
    models.save_captioner(folder, encoder, build_decoder(config).state_dict(), config, vocabulary, {"best_epoch": 1})
    return folder


def read_model(folder: Path) -> Any:
    found = models.load_captioner(folder)
    state = {name: tensor.numpy().tobytes() for name, tensor in found.decoder.state_dict().items()}
    return found.config, found.vocabulary.words, found.vocabulary.max_length, state


def _annotations() -> list[Annotation]:
    place = {"source": "s", "split": "train", "shard": "00000", "captions": ["a dog"]}
    return [Annotation(image_id=f"s/{n}", key=f"{n:08d}", **place) for n in range(NUM_IMAGES)]


def _record(path: Path) -> Path:
    """Writes dvc.lock as DVC would after the stage that made the file."""
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    lock = f"schema: '2.0'\nstages:\n  maker:\n    cmd: x\n    outs:\n    - path: {path}\n      md5: {digest}\n"
    Path("dvc.lock").write_text(lock)
    return path


def _tracked_json(path: Path, value: Callable[[], Any]) -> Callable[[], Path]:
    def make() -> Path:
        storage.write_json(path, value())
        return _record(path)

    return make


def _tracked(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """As a stage that DVC started reads it; by hand, a file may differ from what DVC recorded."""

    def read_as_stage(path: Path) -> Any:
        with patch.dict(os.environ, {"DVC_STAGE": "reader"}):
            return read(tracked.require(path, "maker"))

    return read_as_stage


def _image_records() -> list[dict[str, Any]]:
    return [annotation.model_dump(include=set(ImageRecord.model_fields)) for annotation in _annotations()]


def make_scores() -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = paths.image_scores("encoder-decoder")
    with storage.atomic_write(path) as temporary:
        pq.write_table(pa.table({"image_id": ["s/0", "s/1"], "CIDEr": [0.5, 1.5]}), temporary)
    return _record(path)


def _read_parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def _results() -> list[dict[str, str]]:
    return [{"image_id": f"s/{n}", "caption": "a dog"} for n in range(NUM_IMAGES)]


def _vocabulary() -> dict[str, Any]:
    return Vocabulary([*SPECIAL, "a", "dog"], 4).to_dict()


def _read_vocabulary(path: Path) -> Any:
    return Vocabulary.load(path).to_dict()


FORMATS: dict[str, Format] = {
    "shard (tar)": Format(make_shards, read_shards, "*.tar"),
    "ledger (parquet)": Format(make_shards, read_ledger, "*.parquet"),
    "features (HDF5)": Format(make_features, read_features),
    "attention maps (HDF5)": Format(make_attention, read_attention),
    "checkpoint, tensors": Format(make_checkpoint, read_checkpoint, checkpoints.TENSORS),
    "checkpoint, state": Format(make_checkpoint, read_checkpoint, checkpoints.PLAIN),
    "checkpoint, journal": Format(make_checkpoint, read_checkpoint, checkpoints.JOURNAL),
    "checkpoint, manifest": Format(make_checkpoint, read_checkpoint, storage.MANIFEST),
    "sealed part (JSONL)": Format(make_part, read_part),
    "model, weights": Format(make_model, read_model, "model.safetensors"),
    "model, config": Format(make_model, read_model, "config.json"),
    "model, vocabulary": Format(make_model, read_model, "vocabulary.json"),
    "model, manifest": Format(make_model, read_model, storage.MANIFEST),
    "annotations (JSON)": Format(
        _tracked_json(paths.split_annotations("train"), lambda: dump_annotations(_annotations())),
        _tracked(load_annotations),
    ),
    "images (JSON)": Format(_tracked_json(paths.IMAGES, _image_records), _tracked(load_images)),
    "vocabulary (JSON)": Format(_tracked_json(paths.VOCABULARY, _vocabulary), _tracked(_read_vocabulary)),
    "captions (JSON)": Format(_tracked_json(paths.captions("blip"), _results), _tracked(storage.read_json)),
    "image scores (parquet)": Format(make_scores, _tracked(_read_parquet)),
}
