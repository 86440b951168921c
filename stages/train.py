"""Trains a decoder on an encoder's cached features and keeps the epoch with the best validation CIDEr-D.

python -m stages.train efficientnet_lite0 lstm
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning import paths, stage, storage

if TYPE_CHECKING:
    from captioning.params import DecoderSettings, TrainParams


def train(
    encoder_name: str,
    decoder_name: str,
    weights: str,
    decoder_settings: DecoderSettings,
    settings: TrainParams,
    prepared: Path,
    features: Path,
    live_dir: Path,
    out: Path,
) -> None:
    """Trains, and publishes the complete model directory `out`; DVCLive's history goes to `live_dir` as it grows."""
    from captioning import models, training
    from captioning.decoders import DecoderConfig, build_decoder, check_decoder
    from captioning.encoders import build_encoder
    from captioning.vocabulary import Vocabulary

    check_decoder(decoder_settings.type)
    vocabulary = Vocabulary.load(prepared / "vocabulary.json")
    encoder = build_encoder(encoder_name, weights)
    training.seed_everything(settings.seed, settings.deterministic)
    architecture = decoder_settings.model_dump(exclude={"learning_rate"})
    config = DecoderConfig(vocabulary_size=len(vocabulary), encoder_dim=encoder.encoder_dim, **architecture)
    decoder = build_decoder(config)
    data = _load_data(prepared, features, vocabulary, settings.batch_size)
    with _live(live_dir) as log:
        trainer = training.Trainer(decoder, *data, settings, decoder_settings.learning_rate, log)
        best = trainer.run()
    work = storage.work_folder("train", f"{encoder_name}-{decoder_name}")
    models.save_captioner(work, encoder, best.state, config, vocabulary)
    resolved = {"train": settings.model_dump(), "decoder": decoder_settings.model_dump()}
    storage.write_json(work / "training.json", _record(encoder_name, decoder_name, resolved, best, trainer.history))
    storage.publish(work, out)


def _load_data(prepared: Path, features: Path, vocabulary: Any, batch_size: int) -> tuple[Any, Any, Any]:
    from captioning.annotations import load_annotations
    from captioning.datasets import CaptionBatches, FeatureStore
    from captioning.evaluation import GreedyCider

    batches = {}
    for split in ("train", "val"):
        annotations = load_annotations(prepared / f"{split}.json")
        batches[split] = CaptionBatches(FeatureStore(features, annotations), annotations, vocabulary, batch_size)
    references = [annotation.captions for annotation in annotations]
    return batches["train"], batches["val"], GreedyCider(batches["val"].store, references, vocabulary, 4 * batch_size)


class _live:
    """DVCLive in `live_dir`, as a log function; it never touches dvc.yaml."""

    def __init__(self, live_dir: Path) -> None:
        import os

        from dvclive import Live

        os.environ.setdefault("DVCLIVE_LOGLEVEL", "ERROR")
        self.live = Live(dir=str(live_dir), dvcyaml=None, report=None, save_dvc_exp=False)

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        self.live.step = step
        for name, value in metrics.items():
            self.live.log_metric(name, value)
        self.live.make_summary()

    def __enter__(self) -> _live:
        return self

    def __exit__(self, *error: object) -> None:
        self.live.end()


def _record(encoder: str, decoder: str, resolved: dict[str, Any], best: Any, history: list[Any]) -> dict[str, Any]:
    """Nothing here changes from run to run: the same inputs give the same bytes."""
    import platform
    from importlib.metadata import version

    import torch

    packages = ("torch", "numpy", "h5py", "safetensors")
    return {
        "command": f"dvc repro train@{encoder}-{decoder}",
        "params": resolved,
        "best_epoch": best.epoch + 1,
        "best_val_CIDEr": best.cider,
        "history": history,
        "environment": {
            "python": platform.python_version(),
            "platform": platform.machine(),
            "num_threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            **{package: version(package) for package in packages},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", help="a name from `encoders` in params.yaml")
    parser.add_argument("decoder", help="a name from `decoders` in params.yaml")
    args = parser.parse_args()
    from captioning.params import load_params

    params = load_params()
    captioner = paths.captioner_name(args.encoder, args.decoder)
    for split in ("train", "val"):
        paths.require(paths.split_annotations(split), "prepare")
    paths.require(paths.VOCABULARY, "prepare")
    train(
        args.encoder,
        args.decoder,
        weights=params.encoder_settings[args.encoder].weights,
        decoder_settings=params.decoder_settings[args.decoder],
        settings=params.train,
        prepared=paths.PREPARED,
        features=paths.require(paths.features(args.encoder), f"features@{args.encoder}"),
        live_dir=paths.training(captioner),
        out=paths.model(captioner),
    )


if __name__ == "__main__":
    stage.run(main)
