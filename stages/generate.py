"""Captions the test split with a trained captioner by beam search, and keeps where it looked.

    python -m stages.generate efficientnet_lite0 lstm

Finished batches are kept in .work/generate/ until the stage is recorded, so a killed run goes on at the next one.
"""

from __future__ import annotations

import argparse
import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning import monitoring, paths, stage, storage, tracked, work

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from captioning.beam_search import Hypothesis
    from captioning.datasets import FeatureStore
    from captioning.decoders import Decoder
    from captioning.distributed import World
    from captioning.models import Captioner
    from captioning.params import GenerateParams

Row = dict[str, Any]


def generate(
    model: Path,
    images: Path,
    features: Path,
    shards: Path,
    settings: GenerateParams,
    captions_out: Path,
    attention_out: Path,
) -> None:
    """Writes COCO results, sorted by image id, and the attention maps of the same captions."""
    from captioning.annotations import load_images
    from captioning.distributed import join_world
    from captioning.models import load_captioner
    from captioning.precision import describe_arithmetic

    with tracked.read_verified(model):
        captioner = load_captioner(model)
    test = sorted((image for image in load_images(images) if image.split == "test"), key=lambda image: image.image_id)
    store, decoder = _open_store(captioner, test, features, shards)
    described = [
        settings.model_dump(),
        storage.read_manifest(model)["digest"],
        store.digests,
        describe_arithmetic(captioner.live_precision or "fp32"),
    ]
    name = work.fingerprint("generate", described, [images], ["torch", "numpy"])
    with join_world() as world, work.open_work("generate", name, settings.model_dump(), world) as found:
        ids = [image.image_id for image in test]
        _fill_parts(decoder, store, ids, settings, found.folder / "parts", f"generate {model.name}", world)
        world.wait()
        if world.is_main:
            _publish(_gather(ids, settings.batch_size, found.folder / "parts"), captioner, captions_out, attention_out)
            found.published()


def _open_store(captioner: Captioner, test: list[Any], features: Path, shards: Path) -> tuple[Any, Decoder]:
    """Where the captioner sees the images, and what captions them: pixels, if its encoder was trained with it."""
    from captioning.datasets import FeatureStore
    from captioning.live import ImageStore, LiveCaptioner
    from captioning.precision import choose_device, choose_precision

    if captioner.encoder is None or captioner.live_precision is None:
        with tracked.read_verified(features):
            return FeatureStore(features, test, verify=True), captioner.decoder
    dtype = choose_precision(captioner.live_precision, choose_device())
    return ImageStore(shards, test, captioner.encoder), LiveCaptioner(captioner.encoder, captioner.decoder, dtype)


def _parts(image_ids: list[str], batch_size: int, folder: Path) -> list[tuple[Path, list[str]]]:
    """Each batch's file and image ids."""
    starts = range(0, len(image_ids), batch_size)
    return [(folder / f"{i:06d}.jsonl", image_ids[start : start + batch_size]) for i, start in enumerate(starts)]


def _read(path: Path, image_ids: list[str]) -> list[Row] | None:
    return storage.read_part(path, image_ids)


def _gather(image_ids: list[str], batch_size: int, folder: Path) -> list[Row]:
    from captioning.errors import DamagedError

    rows: list[Row] = []
    for path, ids in _parts(image_ids, batch_size, folder):
        part = _read(path, ids)
        if part is None:
            raise DamagedError(f"{path} cannot be read back. Run `dvc repro` again: the other parts are kept.")
        rows += part
    return rows


def _fill_parts(
    decoder: Decoder,
    store: FeatureStore,
    image_ids: list[str],
    settings: GenerateParams,
    folder: Path,
    title: str,
    world: World,
) -> None:
    """Captions what has no good part yet; the processes share the batches."""
    from captioning.generation import search_store
    from captioning.precision import choose_device
    from captioning.progress import Progress

    parts = _parts(image_ids, settings.batch_size, folder)
    missing = [i for i, part in enumerate(parts) if _read(*part) is None] if world.is_main else []
    missing = world.share(missing)
    if world.is_main and len(missing) < len(parts):
        print(f"resumed: {len(parts) - len(missing)} of {len(parts)} parts verified, {len(missing)} left", flush=True)
    device = choose_device()
    decoder = decoder.to(device)
    options: dict[str, Any] = settings.model_dump(exclude={"num_processes"})
    mine = [missing[number] for number in world.part(len(missing))]
    title += f" (1 of {world.num_processes} processes)" if world.num_processes > 1 else ""
    with Progress(title, sum(len(parts[i][1]) for i in mine), "image", shown=world.is_main) as progress:
        for i in mine:
            path, ids = parts[i]
            start = i * settings.batch_size
            hypotheses = search_store(decoder, store, device, range(start, start + len(ids)), **options)
            storage.write_part(path, [_to_row(*pair) for pair in zip(ids, hypotheses, strict=True)], ids)
            monitoring.count(images=len(ids) * world.num_processes)
            progress.update(len(ids))


def _to_row(image_id: str, hypothesis: Hypothesis) -> Row:
    import numpy as np

    weights = hypothesis.attention_weights.numpy().astype(np.float16)  # (num_words, num_regions), as it is stored
    packed = base64.b64encode(weights.tobytes()).decode()
    return {"image_id": image_id, "token_ids": hypothesis.token_ids, "attention": packed}


def _to_map(row: Row, captioner: Captioner) -> NDArray[np.float16]:
    """(num_words, height × width): what a class token got is shared out among the grid's regions."""
    import numpy as np

    height, width = captioner.grid
    stored = np.frombuffer(base64.b64decode(row["attention"]), np.float16)
    weights = stored.reshape(len(row["token_ids"]), height * width + captioner.num_extra)
    if not captioner.num_extra:
        return weights
    weights = weights[:, captioner.num_extra :].astype(np.float32)
    total = weights.sum(1, keepdims=True)
    return np.where(total > 0, weights / np.maximum(total, 1e-6), 1 / (height * width)).astype(np.float16)


def _by_word(words: list[tuple[str, list[int]]], weights: NDArray[np.float16]) -> tuple[list[str], NDArray[np.float16]]:
    """Whole words with their tokens' positions, and a row of weights a token → the words, and a row for each: where a
    word was said in pieces, the mean of theirs."""
    import numpy as np

    rows = [weights[places].mean(0, dtype=np.float32).astype(np.float16) for _, places in words]
    return [word for word, _ in words], np.stack(rows) if rows else weights


def _publish(rows: list[Row], captioner: Captioner, captions_out: Path, attention_out: Path) -> None:
    from captioning.attention_maps import write_attention_maps

    vocabulary = captioner.vocabulary
    maps = ((row["image_id"], *_by_word(vocabulary.join(row["token_ids"]), _to_map(row, captioner))) for row in rows)
    write_attention_maps(attention_out, captioner.grid, maps)
    storage.write_json(
        captions_out, [{"image_id": r["image_id"], "caption": vocabulary.decode(r["token_ids"])} for r in rows]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", help="a name from `encoders` in params.yaml")
    parser.add_argument("decoder", help="a name from `decoders` in params.yaml")
    args = parser.parse_args()
    from captioning.params import load_params

    params = load_params()
    captioner = paths.captioner_name(args.encoder, args.decoder)
    model = paths.require(paths.model(captioner), f"train@{captioner}")
    images = tracked.require(paths.IMAGES, "prepare")
    features = paths.require(paths.features(args.encoder), f"features@{args.encoder}")
    if stage.run_processes(params.generate.num_processes, params.recovery.max_restarts):
        return
    with stage.running(params):
        generate(
            model,
            images,
            features,
            shards=paths.SHARDS,
            settings=params.generate,
            captions_out=paths.captions(captioner),
            attention_out=paths.attention(captioner),
        )


if __name__ == "__main__":
    stage.run(main)
