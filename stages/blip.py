"""Captions the test split with BLIP: `python -m stages.blip`.

`blip.weights` is a name on the Hugging Face hub, a local folder, or `train`: a small BLIP is then built and trained on
the train split here (about 3 minutes on 2 CPU cores for the embedded data). Writes data/captions/blip.json. A killed
run goes on at its last checkpoint, or at the next batch of images to caption.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning import paths, stage, storage, tracked
from captioning.annotations import Annotation, load_annotations, load_images
from captioning.errors import CapstanError
from captioning.params import RecoveryParams, SmallBlip, load_params
from captioning.work import Work, fingerprint, open_work

if TYPE_CHECKING:
    from captioning.blip import BlipCaptioner
    from captioning.vocabulary import Vocabulary

PACKAGES = ("torch", "transformers", "numpy", "pillow", "safetensors")


def train_captioner(
    work: Work,
    *,
    name: str,
    shards: Path,
    train: list[Annotation],
    vocabulary: Vocabulary,
    small: SmallBlip,
    prompt: str,
    longest: int,
    batch_size: int,
    precision: str,
    seed: int,
    recovery: RecoveryParams,
) -> BlipCaptioner:
    """Builds and trains the small BLIP, from its newest checkpoint in `work` on if there is one.

    Args:
        name: the fingerprint of all that the weights depend on.
        longest: the longest caption in words, with its prompt.

    Raises:
        CapstanError: sizes that do not fit each other, or losses that are not finite.
        Interrupted: on SIGTERM or SIGINT, after the state was saved.
    """
    import torch

    from captioning.blip import iterate_images
    from captioning.blip_training import MAX_SKIPPED_STEPS, BlipTask, as_captioner, build_small_blip, store_pixels
    from captioning.checkpoints import Checkpointer
    from captioning.loop import Journal, Loop

    captions = [[vocabulary.encode(text)[: vocabulary.max_length] for text in image.captions] for image in train]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products on a GPU ask for
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    model = build_small_blip(small, vocabulary, longest)
    rows = {image.image_id: row for row, image in enumerate(train)}
    target = work.folder / "pixels.npy"
    load_pixels = partial(store_pixels, target, lambda: iterate_images(shards, train), rows, small.image_px)
    task = BlipTask(model, load_pixels, captions, small, batch_size, precision, seed)
    keeper = Checkpointer(work.folder / "checkpoints", name, recovery, work.lock)
    Loop(task, Journal(lambda step, metrics: None), MAX_SKIPPED_STEPS, keeper).run()
    target.unlink(missing_ok=True)  # large, and the last checkpoint is on disk
    losses = task.losses
    print(f"blip: trained {len(losses)} epochs on {len(train)} images, loss {losses[0]:.3f} → {losses[-1]:.3f}")
    return as_captioner(model, small, vocabulary, prompt)


def blip(
    *,
    shards: Path,
    prepared: Path,
    out: Path,
    weights: str,
    small: SmallBlip,
    prompt: str,
    batch_size: int,
    precision: str,
    num_beams: int,
    max_length: int,
    seed: int,
    recovery: RecoveryParams,
) -> None:
    """Captions every image of the test split and writes COCO results, sorted by image_id, to `out`.

    Raises:
        CapstanError: no test images, shards that do not fit them, or weights that cannot be had.
        Interrupted: on SIGTERM or SIGINT; what is finished is kept.
    """
    from captioning.blip import caption_images, load_pretrained
    from captioning.blip_weights import TRAIN, find_weights, weight_files
    from captioning.precision import describe_arithmetic

    images_file = prepared / paths.IMAGES.name
    test = [image for image in load_images(images_file) if image.split == "test"]
    if not test:
        raise CapstanError(f"{images_file} has no image of the test split: set the sources' test_fraction")
    training: dict[str, Any] = {"small": small, "batch_size": batch_size, "precision": precision, "seed": seed}
    if weights == TRAIN:
        training |= _training_inputs(prepared, prompt, max_length)
        name = _training_fingerprint(shards, prepared, **training)
    else:
        folder = find_weights(weights)
        inputs = [shards / paths.LEDGER.name, *weight_files(folder)]
        name = fingerprint("blip", [weights, describe_arithmetic(precision)], inputs, PACKAGES)
    with open_work("blip", name, about={"weights": weights, "seed": seed}) as work:
        if weights == TRAIN:
            build = partial(
                train_captioner, work, name=name, shards=shards, prompt=prompt, recovery=recovery, **training
            )
        else:
            build = partial(load_pretrained, folder, prompt)
        captions = caption_images(
            build,
            shards,
            test,
            work.folder / "parts",
            prompt=prompt,
            batch_size=batch_size,
            precision=precision,
            num_beams=num_beams,
            max_length=max_length,
        )
        results = [{"image_id": image_id, "caption": captions[image_id]} for image_id in sorted(captions)]
        storage.write_json(out, results)
        work.published()


def _training_inputs(prepared: Path, prompt: str, max_length: int) -> dict[str, Any]:
    """What training reads, and the longest caption that the model must be able to hold."""
    from captioning.vocabulary import Vocabulary

    vocabulary = Vocabulary.load(prepared / paths.VOCABULARY.name)
    train_file = prepared / paths.split_annotations("train").name
    train = [annotation for annotation in load_annotations(train_file) if annotation.captions]
    if not train:
        raise CapstanError(f"{train_file} has no captions to train BLIP on")
    longest = max(vocabulary.max_length, max_length + len(vocabulary.encode(prompt)))
    return {"train": train, "vocabulary": vocabulary, "longest": longest}


def _training_fingerprint(
    shards: Path,
    prepared: Path,
    *,
    small: SmallBlip,
    longest: int,
    batch_size: int,
    precision: str,
    seed: int,
    **_: object,
) -> str:
    """Of what the weights depend on. How captions are then made stands in each of their parts."""
    from captioning.precision import describe_arithmetic

    settings = [small.model_dump(), longest, batch_size, seed, describe_arithmetic(precision)]
    names = (paths.split_annotations("train").name, paths.VOCABULARY.name)
    return fingerprint("blip", settings, [shards / paths.LEDGER.name, *(prepared / n for n in names)], PACKAGES)


def main() -> None:
    argparse.ArgumentParser(prog="python -m stages.blip", description=__doc__).parse_args()
    params = load_params()
    with stage.running(params):
        for path in (paths.IMAGES, paths.VOCABULARY, paths.split_annotations("train")):
            tracked.require(path, "prepare")
        blip(
            shards=paths.require(paths.LEDGER, "download").parent,
            prepared=paths.PREPARED,
            out=paths.captions("blip"),
            recovery=params.recovery,
            **{name: getattr(params.blip, name) for name in type(params.blip).model_fields},
        )


if __name__ == "__main__":
    stage.run(main)
