"""Flickr8k (Hodosh, Young and Hockenmaier 2013) and Flickr30k (Young et al. 2014) from their own archives.

Files: Flickr8k_Dataset.zip and Flickr8k_text.zip; or Flickr30k's images, results_20130124.token and Karpathy's
dataset_flickr30k.json (alone or inside caption_datasets.zip).
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from captioning import archives
from captioning.errors import CapstanError
from captioning.source_params import Flickr30kSource, FlickrSource
from captioning.sources.table import Row, clean_captions, file_url, split_name, take_evenly

FLICKR8K_SPLITS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}


def parse_tokens(text: str, origin: str) -> dict[str, list[str]]:
    """Captions by image name from lines of `name.jpg#0<TAB>caption`.

    A few names carry a stray suffix (`2258277193_586949ec62.jpg.1#0`); it is cut off.

    Raises:
        CapstanError: a line without number or tab; names the line.
    """
    captions: dict[str, list[str]] = defaultdict(list)
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        head, tab, caption = line.partition("\t")
        name, hash_sign, _ = head.rpartition("#")
        if not tab or not hash_sign:
            raise CapstanError(f"{origin} line {number}: expected `image.jpg#0<TAB>caption`, got {line[:80]!r}")
        stem, extension, _ = name.rpartition(".jpg")
        captions[stem + extension].append(caption)
    return captions


def _rows(source: str, images: Path, captions: dict[str, list[str]], splits: list[tuple[str, str]]) -> list[Row]:
    return [
        Row(
            image_id=f"{source}/{Path(name).stem}",
            source=source,
            split=split,
            url=name,
            location=file_url(images / name),
            captions=clean_captions(captions.get(name, [])),
        )
        for name, split in splits
    ]


def flickr8k_rows(settings: FlickrSource, folder: Path, seed: int) -> list[Row]:
    """All images of the three split lists, in the lists' order. An image that the archive lacks is a failed row."""
    text = archives.locate(settings.captions, settings.root)
    tokens = archives.read_text(text, "Flickr8k.token.txt")
    splits = [
        (name.strip(), split)
        for split, listing in FLICKR8K_SPLITS.items()
        for name in archives.read_text(text, listing).splitlines()
        if name.strip()
    ]
    splits = take_evenly(splits, settings.max_images)
    images = archives.image_folder(settings.images, settings.root, {name for name, _ in splits}, folder)
    return _rows("flickr8k", images, parse_tokens(tokens, "Flickr8k.token.txt"), splits)


def flickr30k_rows(settings: Flickr30kSource, folder: Path, seed: int) -> list[Row]:
    """Karpathy's splits (29000 / 1014 / 1000) with the captions of the token file."""
    token_file = archives.locate(settings.captions, settings.root)
    captions = parse_tokens(archives.read_text(token_file, "results_20130124.token"), "results_20130124.token")
    karpathy = load_karpathy(archives.locate(settings.splits, settings.root), "dataset_flickr30k.json")
    splits = [(image["filename"], split_name(image["split"], "dataset_flickr30k.json")) for image in karpathy]
    splits = take_evenly(splits, settings.max_images)
    images = archives.image_folder(settings.images, settings.root, {name for name, _ in splits}, folder)
    return _rows("flickr30k", images, captions, splits)


def load_karpathy(path: Path, name: str) -> list[dict[str, Any]]:
    """`images` of a split file by Karpathy and Fei-Fei (2015), alone or inside caption_datasets.zip.

    Raises:
        CapstanError: not JSON, or not of that form.
    """
    try:
        images = json.loads(archives.read_text(path, name))["images"]
        for image in images:
            image["filename"], image["split"]  # noqa: B018  both must be there
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CapstanError(f"{name} in {path} is not a Karpathy split file: {error!r}. Fetch it again.") from None
    return list(images)
