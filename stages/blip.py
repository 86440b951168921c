"""Captions the test split with BLIP: `python -m stages.blip`.

`blip.weights` is a name on the Hugging Face hub, a local folder, or `train`: a small BLIP is then built and trained on
the train split here (about 90 s on 2 CPU cores for the embedded data). Writes data/captions/blip.json.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from captioning import paths, stage, storage
from captioning.annotations import load_annotations, load_images
from captioning.errors import CapstanError
from captioning.params import SmallBlip, load_params

if TYPE_CHECKING:
    from captioning.blip import BlipCaptioner

SCHEMA_VERSION = 1


def train_captioner(
    *,
    shards: Path,
    prepared: Path,
    small: SmallBlip,
    prompt: str,
    batch_size: int,
    precision: str,
    max_length: int,
    seed: int,
) -> BlipCaptioner:
    """Builds and trains the small BLIP on the train split. The same seed gives the same captions on the same machine.

    Raises:
        CapstanError: no train images, or sizes that do not fit each other.
    """
    import torch

    from captioning.blip import iterate_images
    from captioning.blip_training import as_captioner, build_small_blip, store_pixels, train_small_blip
    from captioning.vocabulary import Vocabulary

    vocabulary = Vocabulary.load(prepared / paths.VOCABULARY.name)
    train_file = prepared / paths.split_annotations("train").name
    train = [annotation for annotation in load_annotations(train_file) if annotation.captions]
    if not train:
        raise CapstanError(f"{train_file} has no captions to train BLIP on")
    captions = [[vocabulary.encode(text)[: vocabulary.max_length] for text in image.captions] for image in train]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products on a GPU ask for
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    longest = max(vocabulary.max_length, max_length + len(vocabulary.encode(prompt)))
    model = build_small_blip(small, vocabulary, longest)
    name = storage.fingerprint("blip", [SCHEMA_VERSION, small.image_px], [shards / paths.LEDGER.name, train_file])
    rows = {image.image_id: row for row, image in enumerate(train)}
    target = storage.work_folder("blip", name) / "pixels.npy"
    pixels = store_pixels(target, iterate_images(shards, train), rows, small.image_px)
    losses = train_small_blip(model, pixels, captions, small, batch_size, precision, seed)
    print(f"blip: trained {len(losses)} epochs on {len(train)} images, loss {losses[0]:.3f} → {losses[-1]:.3f}")
    storage.discard_work("blip", name)
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
) -> None:
    """Captions every image of the test split and writes COCO results, sorted by image_id, to `out`.

    Raises:
        CapstanError: no test images, shards that do not fit them, or weights that cannot be had.
    """
    from captioning.blip import TRAIN, caption_images, iterate_images, load_pretrained

    images_file = prepared / paths.IMAGES.name
    test = [image for image in load_images(images_file) if image.split == "test"]
    if not test:
        raise CapstanError(f"{images_file} has no image of the test split: set the sources' test_fraction")
    if weights == TRAIN:
        captioner = train_captioner(
            shards=shards,
            prepared=prepared,
            small=small,
            prompt=prompt,
            batch_size=batch_size,
            precision=precision,
            max_length=max_length,
            seed=seed,
        )
    else:
        captioner = load_pretrained(weights, prompt)
    captions = caption_images(
        captioner, iterate_images(shards, test), len(test), batch_size, precision, num_beams, max_length
    )
    storage.write_json(out, [{"image_id": image_id, "caption": captions[image_id]} for image_id in sorted(captions)])


def main() -> None:
    argparse.ArgumentParser(prog="python -m stages.blip", description=__doc__).parse_args()
    params = load_params()
    for path in (paths.IMAGES, paths.VOCABULARY):
        paths.require(path, "prepare")
    blip(
        shards=paths.require(paths.LEDGER, "download").parent,
        prepared=paths.require(paths.split_annotations("train"), "prepare").parent,
        out=paths.captions("blip"),
        **{name: getattr(params.blip, name) for name in type(params.blip).model_fields},
    )


if __name__ == "__main__":
    stage.run(main)
