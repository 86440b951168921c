"""Trains a decoder on an encoder's cached features and keeps the epoch with the best validation CIDEr-D.

    python -m stages.train efficientnet_lite0 lstm

A killed run goes on at its newest good checkpoint in .work/train/ and ends with the bits of one that was never stopped.
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning import monitoring, paths, stage, storage, tracked, work
from captioning.errors import CapstanError

if TYPE_CHECKING:
    from captioning.distributed import World
    from captioning.params import DecoderSettings, RecoveryParams, TrainParams
    from captioning.training import DecoderTask

PACKAGES = ("torch", "numpy", "h5py", "safetensors")


def train(
    encoder_name: str,
    decoder_name: str,
    weights: str,
    decoder_settings: DecoderSettings,
    settings: TrainParams,
    recovery: RecoveryParams,
    prepared: Path,
    features: Path,
    live_dir: Path,
    out: Path,
) -> None:
    """Trains, and publishes the complete model directory `out`; DVCLive's history goes to `live_dir` as it grows."""
    from captioning import models, training
    from captioning.decoders import DecoderConfig, build_decoder, check_decoder
    from captioning.distributed import join_world
    from captioning.encoders import build_encoder
    from captioning.vocabulary import Vocabulary

    check_decoder(decoder_settings.type)
    vocabulary = Vocabulary.load(prepared / "vocabulary.json")
    encoder = build_encoder(encoder_name, weights)
    architecture = decoder_settings.model_dump(exclude={"learning_rate"})
    config = DecoderConfig(vocabulary_size=len(vocabulary), encoder_dim=encoder.encoder_dim, **architecture)
    resolved = {"train": settings.model_dump(), "decoder": decoder_settings.model_dump()}
    with join_world() as world:
        training.seed_everything(settings.seed, settings.deterministic)
        with tracked.read_verified(features):
            data = _load_data(prepared, features, vocabulary, settings.batch_size)
        name = _fingerprint(resolved, config, encoder, data[0], prepared, world)
        with work.open_work("train", name, resolved, world) as found, _live(live_dir, world) as log:
            task, num_skipped = _train(
                build_decoder(config), data, decoder_settings, settings, recovery, found, log, world
            )
            if world.is_main:
                record = _record(encoder_name, decoder_name, resolved, task, num_skipped, world)
                models.save_captioner(found.folder / "model", encoder, task.best.state, config, vocabulary, record)
                log.mend(task.journal.lines)
                storage.publish(found.folder / "model", out)
                found.published()


def _train(
    decoder: Any,
    data: tuple[Any, Any, Any],
    decoder_settings: DecoderSettings,
    settings: TrainParams,
    recovery: RecoveryParams,
    found: work.Work,
    log: _live,
    world: World,
) -> tuple[DecoderTask, int]:
    from captioning.checkpoints import Checkpointer
    from captioning.loop import Journal, Loop
    from captioning.training import DecoderTask

    journal = Journal(log)
    task = DecoderTask(decoder, *data, settings, decoder_settings.learning_rate, journal, world)
    keeper = Checkpointer(found.folder / "checkpoints", found.name, recovery, found.lock) if world.is_main else None
    loop = Loop(task, journal, settings.max_skipped_steps, keeper, world)
    loop.run()
    return task, loop.position.num_skipped


def _fingerprint(resolved: Any, config: Any, encoder: Any, batches: Any, prepared: Path, world: World) -> str:
    """All that the weights' bits depend on."""
    from dataclasses import asdict

    from captioning.precision import describe_arithmetic

    arithmetic = [world.num_processes, *describe_arithmetic(resolved["train"]["precision"])]
    settings = [resolved, asdict(config), encoder.describe(), batches.store.digests, arithmetic]
    inputs = [prepared / f"{name}.json" for name in ("train", "val", "vocabulary")]
    return work.fingerprint("train", settings, inputs, PACKAGES)


def _load_data(prepared: Path, features: Path, vocabulary: Any, batch_size: int) -> tuple[Any, Any, Any]:
    from captioning.annotations import load_annotations
    from captioning.datasets import CaptionBatches, FeatureStore
    from captioning.evaluation import GreedyCider

    batches = {}
    for split in ("train", "val"):
        annotations = load_annotations(prepared / f"{split}.json")
        batches[split] = CaptionBatches(
            FeatureStore(features, annotations, verify=True), annotations, vocabulary, batch_size
        )
    references = [annotation.captions for annotation in annotations]
    return batches["train"], batches["val"], GreedyCider(batches["val"].store, references, vocabulary, 4 * batch_size)


class _live:
    """DVCLive in `live_dir`, as a log function of the main process; it never touches dvc.yaml.

    What cannot be written (a full disk) must not end the run: it is all in the journal, and `mend` writes it again.
    """

    def __init__(self, live_dir: Path, world: World) -> None:
        self.live_dir, self.is_main = live_dir, world.is_main
        self.live: Any = None
        self.torn = not self._begin()

    def _begin(self) -> bool:
        import os

        if not self.is_main:
            return True
        from dvclive import Live

        os.environ.setdefault("DVCLIVE_LOGLEVEL", "ERROR")
        try:
            storage.remove(self.live_dir)  # a resumed run logs all again, from its checkpoint
            self.live = Live(dir=str(self.live_dir), dvcyaml=None, report=None, save_dvc_exp=False)
        except OSError:
            return False
        return True

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        if self.live is None:
            return
        try:
            self.live.step = step
            for name, value in metrics.items():
                self.live.log_metric(name, value)
            self.live.make_summary()
        except OSError as error:
            self.torn = True
            monitoring.alert("curves", f"training curves are not written ({error.strerror}); they are when it ends")

    def mend(self, lines: list[str]) -> None:
        """Writes everything again from the journal, where something could not be written."""
        import json

        if not self.torn:
            return
        self.torn = not self._begin()
        for entry in map(json.loads, lines):
            self(entry["step"], entry["metrics"])
        if self.torn:
            raise CapstanError(
                f"{self.live_dir} cannot be written. Make room and run `dvc repro` again; nothing is lost."
            )

    def __enter__(self) -> _live:
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            with suppress(OSError):
                self.live.end()


def _record(
    encoder: str, decoder: str, resolved: dict[str, Any], task: DecoderTask, num_skipped: int, world: World
) -> dict[str, Any]:
    """Nothing here changes from run to run: the same inputs give the same bytes."""
    import platform
    from importlib.metadata import version

    import torch

    return {
        "command": f"dvc repro train@{encoder}-{decoder}",
        "params": resolved,
        "best_epoch": task.best.epoch + 1,
        "best_val_CIDEr": task.best.cider,
        "num_skipped_steps": num_skipped,
        "history": task.history,
        "environment": {
            "python": platform.python_version(),
            "platform": platform.machine(),
            "num_processes": world.num_processes,
            "num_threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            **{package: version(package) for package in PACKAGES},
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
        tracked.require(paths.split_annotations(split), "prepare")
    tracked.require(paths.VOCABULARY, "prepare")
    features = paths.require(paths.features(args.encoder), f"features@{args.encoder}")
    if stage.run_processes(params.train.num_processes, params.recovery.max_restarts, several_hosts=True):
        return
    with stage.running(params):
        train(
            args.encoder,
            args.decoder,
            weights=params.encoder_settings[args.encoder].weights,
            decoder_settings=params.decoder_settings[args.decoder],
            settings=params.train,
            recovery=params.recovery,
            prepared=paths.PREPARED,
            features=features,
            live_dir=paths.training(captioner),
            out=paths.model(captioner),
        )


if __name__ == "__main__":
    stage.run(main)
