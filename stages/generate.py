"""Captions the test split with a trained captioner by beam search, and keeps where it looked.

python -m stages.generate efficientnet_lite0 lstm
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning import paths, stage, storage

if TYPE_CHECKING:
    from captioning.params import GenerateParams


def generate(
    model: Path, images: Path, features: Path, settings: GenerateParams, captions_out: Path, attention_out: Path
) -> None:
    """Writes COCO results, sorted by image id, and the attention maps of the same captions."""
    from captioning.annotations import load_images
    from captioning.attention_maps import write_attention_maps
    from captioning.datasets import FeatureStore
    from captioning.generation import search_store
    from captioning.models import load_captioner
    from captioning.precision import choose_device
    from captioning.progress import Progress

    captioner = load_captioner(model)
    test = sorted((image for image in load_images(images) if image.split == "test"), key=lambda image: image.image_id)
    store = FeatureStore(features, test)
    device = choose_device()
    options: dict[str, Any] = settings.model_dump()
    with Progress(f"generate {model.name}", total=len(test), unit="image") as progress:
        found = list(search_store(captioner.decoder.to(device), store, device, progress=progress, **options))
    vocabulary = captioner.vocabulary
    results = [
        {"image_id": image.image_id, "caption": vocabulary.decode(hypothesis.token_ids)}
        for image, hypothesis in zip(test, found, strict=True)
    ]
    maps = (
        (image.image_id, [vocabulary.words[i] for i in hypothesis.token_ids], hypothesis.attention_weights.numpy())
        for image, hypothesis in zip(test, found, strict=True)
    )
    write_attention_maps(attention_out, captioner.grid, maps)
    storage.write_json(captions_out, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", help="a name from `encoders` in params.yaml")
    parser.add_argument("decoder", help="a name from `decoders` in params.yaml")
    args = parser.parse_args()
    from captioning.params import load_params

    params = load_params()
    captioner = paths.captioner_name(args.encoder, args.decoder)
    generate(
        paths.require(paths.model(captioner), f"train@{captioner}"),
        paths.require(paths.IMAGES, "prepare"),
        paths.require(paths.features(args.encoder), f"features@{args.encoder}"),
        params.generate,
        paths.captions(captioner),
        paths.attention(captioner),
    )


if __name__ == "__main__":
    stage.run(main)
