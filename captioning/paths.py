"""Where everything lies. Paths are relative to the repository root, which is every stage's working directory."""

from __future__ import annotations

import os
from pathlib import Path

from captioning.errors import CapstanError

PARAMS = Path("params.yaml")
SHARDS = Path("data/shards")
LEDGER = SHARDS / "ledger.parquet"
PREPARED = Path("data/prepared")
IMAGES = PREPARED / "images.json"
VOCABULARY = PREPARED / "vocabulary.json"
SAMPLES = PREPARED / "samples"
STATISTICS = Path("reports/data.json")
FEATURES = Path("data/features")
MODELS = Path("data/models")
CAPTIONS = Path("data/captions")
SCORES = Path("reports/scores")
IMAGE_SCORES = Path("data/scores")
TRAINING = Path("reports/training")
REPORTS = Path("reports")
SPLITS = ("train", "val", "test")


def split_annotations(split: str) -> Path:
    """The annotations of one split: a JSON list of `captioning.annotations.Annotation`."""
    return PREPARED / f"{split}.json"


def features(encoder: str) -> Path:
    return FEATURES / encoder


def model(captioner: str) -> Path:
    return MODELS / captioner


def captions(captioner: str) -> Path:
    """Hypotheses for the test split in COCO's results format."""
    return CAPTIONS / f"{captioner}.json"


def attention(captioner: str) -> Path:
    """Attention maps of the hypotheses (`captioning.attention_maps`); trained captioners only."""
    return CAPTIONS / f"{captioner}.attention.h5"


def scores(captioner: str) -> Path:
    return SCORES / f"{captioner}.json"


def image_scores(captioner: str) -> Path:
    return IMAGE_SCORES / f"{captioner}.parquet"


def training(captioner: str) -> Path:
    """DVCLive's directory: metrics.json, plots/metrics/**/*.tsv."""
    return TRAINING / captioner


def captioner_name(encoder: str, decoder: str) -> str:
    return f"{encoder}-{decoder}"


def work_root() -> Path:
    """`.work` of the main repository: `$DVC_ROOT` outlives the temporary folder of `dvc exp run --temp`."""
    return Path(os.environ.get("DVC_ROOT", ".")) / ".work"


def logs(captioner: str) -> Path:
    """What Weights & Biases and TensorBoard read; in `.work`, so that it outlives temporary folders, too."""
    return work_root() / "logs" / captioner


def require(path: Path, stage: str) -> Path:
    """The path, if it holds something.

    Raises:
        CapstanError: the file or directory is missing or empty; says which stage makes it.
    """
    empty = not path.exists() or (
        not any(p for p in path.iterdir() if p.name != ".gitignore") if path.is_dir() else path.stat().st_size == 0
    )
    if empty:
        raise CapstanError(
            f"{path} is missing or empty. Make it with `dvc repro {stage}`, or fetch it with `dvc pull {path}`."
        )
    return path
