"""Trains a decoder, on cached features or with its encoder, and keeps the best epoch by validation CIDEr-D.

    python -m stages.train efficientnet_lite0 lstm

A killed run goes on at its newest good checkpoint in .work/train/ and ends with the bits of one that was never stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning import paths, run_logs, stage, storage, tracked, work

if TYPE_CHECKING:
    from captioning.decoders import Decoder
    from captioning.distributed import World
    from captioning.encoders import Encoder
    from captioning.logging_params import LoggingParams
    from captioning.params import DecoderSettings, EncoderSettings, RecoveryParams, TrainParams
    from captioning.resolving import Resolved
    from captioning.training import DecoderTask
    from captioning.training_data import Data
    from captioning.training_log import TrainingLog

PACKAGES = ("torch", "numpy", "h5py", "safetensors")


def train(
    encoder_name: str,
    decoder_name: str,
    encoder_settings: EncoderSettings,
    decoder_settings: DecoderSettings,
    settings: TrainParams,
    recovery: RecoveryParams,
    logging: LoggingParams,
    prepared: Path,
    features: Path,
    shards: Path,
    live_dir: Path,
    logs: Path,
    out: Path,
) -> None:
    """Trains, and publishes the complete model directory `out`; DVCLive's history goes to `live_dir` as it grows, and
    what `logging` asks for to `logs`."""
    from captioning import models, training
    from captioning.decoders import DecoderConfig, start_decoder
    from captioning.distributed import join_world
    from captioning.training_data import load_data
    from captioning.vocabulary import Vocabulary

    vocabulary = Vocabulary.load(prepared / "vocabulary.json")
    encoder = _load_encoder(encoder_name, encoder_settings, settings, features)
    architecture = decoder_settings.model_dump(exclude={"learning_rate"})
    config = DecoderConfig(vocabulary_size=len(vocabulary), encoder_dim=encoder.encoder_dim, **architecture)
    resolved = {"train": settings.model_dump(), "decoder": decoder_settings.model_dump()}
    if settings.encoder_mode == "live":
        resolved["encoder"] = encoder_settings.model_dump()
    with join_world() as world:
        training.seed_everything(settings.seed, settings.deterministic)
        folder = shards if settings.encoder_mode == "live" else features
        with tracked.read_verified(folder):
            data = load_data(prepared, folder, encoder, vocabulary, settings)
        name = _fingerprint(resolved, config, encoder, data[0], prepared, world)
        with (
            work.open_work("train", name, resolved, world) as found,
            _open_log(live_dir, logs, name, resolved, logging, world) as log,
        ):
            model, parts = _assemble(encoder, start_decoder(config, vocabulary), encoder_settings, settings)
            values = _resolve(model, data, decoder_settings, settings, found.folder, world)
            task, num_skipped = _train(model, data, values, recovery, found, log, world, parts)
            if world.is_main:
                record = _record(encoder_name, decoder_name, resolved, values, task, num_skipped, world)
                state = _split_best(task.best.state, encoder, settings, encoder_settings)
                live = settings.precision if settings.encoder_mode == "live" else None
                models.save_captioner(found.folder / "model", encoder, state, config, vocabulary, record, live)
                log.mend(task.journal.lines)
                storage.publish(found.folder / "model", out)
                found.published()


def _open_log(
    live_dir: Path, logs: Path, name: str, resolved: Any, logging: LoggingParams, world: World
) -> TrainingLog:
    from captioning.curves import Curves
    from captioning.training_log import TrainingLog

    if not world.is_main:
        return TrainingLog(None)
    return TrainingLog(Curves(live_dir), run_logs.open_log(logging, logs, name, resolved))


def _load_encoder(name: str, encoder_settings: EncoderSettings, settings: TrainParams, features: Path) -> Encoder:
    """The encoder that the features were made with."""
    from captioning.encoders import build_encoder
    from captioning.feature_files import open_features

    with tracked.read_verified(features):
        made_with = open_features(min(features.glob("*.h5"))).encoder
    grid = made_with["grid"] if made_with["pooled_from"] else None
    encoder = build_encoder(name, encoder_settings.weights, grid, made_with["class_token"])
    encoder.choose_stages(encoder_settings.trainable)  # a wrong name ends the stage before it reads data
    return encoder


def _assemble(
    encoder: Encoder, decoder: Decoder, encoder_settings: EncoderSettings, settings: TrainParams
) -> tuple[Decoder, list[Any]]:
    """What is trained, and the encoder's parts for the optimizer."""
    if settings.encoder_mode == "cached":
        return decoder, []
    from captioning.live import LiveCaptioner
    from captioning.precision import choose_device, choose_precision

    dtype = choose_precision(settings.precision, choose_device())
    stages = encoder.choose_stages(encoder_settings.trainable)
    model = LiveCaptioner(encoder, decoder, dtype, stages, encoder_settings.unfreeze_every_epochs)
    return model, [(named, encoder_settings.learning_rate) for named in model.trainable().values()]


def _split_best(
    state: dict[str, Any], encoder: Encoder, settings: TrainParams, encoder_settings: EncoderSettings
) -> dict[str, Any]:
    """The decoder's part of the best epoch; in live mode the encoder takes its own."""
    from captioning import tensor_files

    if settings.encoder_mode == "cached":
        return state
    parts: dict[str, dict[str, Any]] = {"encoder": {}, "decoder": {}}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    encoder.load_state_dict(parts["encoder"])
    if encoder_settings.trainable != "none":
        encoder.weights_digest = tensor_files.digest_tensors(parts["encoder"])
    return parts["decoder"]


def _resolve(
    model: Decoder,
    data: Data,
    decoder_settings: DecoderSettings,
    settings: TrainParams,
    folder: Path,
    world: World,
) -> Resolved:
    """Numbers for what is `auto`; the data take their sizes."""
    from captioning import resolving, trials

    values = resolving.resolve(
        settings,
        decoder_settings,
        len(data[0].captions),
        lambda plain: trials.images_that_fit(model, data, plain),
        lambda plain: trials.range_test(model, data, plain, world.num_processes),
        folder,
        world,
    )
    resolving.set_sizes(data, values.settings)
    return values


def _train(
    model: Decoder,
    data: Data,
    values: Resolved,
    recovery: RecoveryParams,
    found: work.Work,
    log: TrainingLog,
    world: World,
    encoder_parts: list[Any],
) -> tuple[DecoderTask, int]:
    from captioning.checkpoints import Checkpointer
    from captioning.loop import Journal, Loop
    from captioning.training import DecoderTask

    journal = Journal(log, log.again)
    task = DecoderTask(model, *data, values.settings, values.learning_rate, journal, world, encoder_parts)
    log.watch(task)
    keeper = Checkpointer(found.folder / "checkpoints", found.name, recovery, found.lock) if world.is_main else None
    loop = Loop(task, journal, values.settings.max_skipped_steps, keeper, world)
    loop.run()
    return task, loop.position.num_skipped


def _fingerprint(resolved: Any, config: Any, encoder: Any, batches: Any, prepared: Path, world: World) -> str:
    """All that the weights' bits depend on."""
    from dataclasses import asdict

    from captioning.compiling import describe_compiler
    from captioning.decoders.word_vectors import digest_vectors
    from captioning.precision import describe_arithmetic

    settings = resolved["train"]
    arithmetic = [world.num_processes, *describe_arithmetic(settings["precision"])]
    arithmetic += describe_compiler(settings["compile"])
    vectors = digest_vectors(config.embeddings) if config.embeddings else None
    parts = [resolved, asdict(config), encoder.describe(), batches.store.digests, vectors, arithmetic]
    inputs = [prepared / f"{name}.json" for name in ("train", "val", "vocabulary")]
    return work.fingerprint("train", parts, inputs, PACKAGES)


def _record(
    encoder: str,
    decoder: str,
    params: dict[str, Any],
    values: Resolved,
    task: DecoderTask,
    num_skipped: int,
    world: World,
) -> dict[str, Any]:
    """Nothing here changes from run to run: the same inputs give the same bytes."""
    import platform
    from importlib.metadata import version

    import torch

    return {
        "command": f"dvc repro train@{encoder}-{decoder}",
        "params": params,
        "resolved": {**values.found, "images_at_once": task.fittings["train"].num_images},
        "best_epoch": task.best.epoch + 1,
        "best_val_CIDEr": task.best.cider,
        "num_skipped_steps": num_skipped,
        "compiled": task.compilation.used,
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
    run_logs.check_installed(params.logging)
    captioner = paths.captioner_name(args.encoder, args.decoder)
    for split in ("train", "val"):
        tracked.require(paths.split_annotations(split), "prepare")
    tracked.require(paths.VOCABULARY, "prepare")
    features = paths.require(paths.features(args.encoder), f"features@{args.encoder}")
    if params.train.encoder_mode == "live":
        paths.require(paths.LEDGER, "download")
    if stage.run_processes(params.train.num_processes, params.recovery.max_restarts, several_hosts=True):
        return
    with stage.running(params):
        train(
            args.encoder,
            args.decoder,
            encoder_settings=params.encoder_settings[args.encoder],
            decoder_settings=params.decoder_settings[args.decoder],
            settings=params.train,
            recovery=params.recovery,
            logging=params.logging,
            prepared=paths.PREPARED,
            features=features,
            shards=paths.SHARDS,
            live_dir=paths.training(captioner),
            logs=paths.logs(captioner),
            out=paths.model(captioner),
        )


if __name__ == "__main__":
    stage.run(main)
