"""COCO captions 2014 and 2017 (Chen et al. 2015): official annotations; images by `coco_url` or local."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from captioning import archives
from captioning.errors import CapstanError
from captioning.source_params import CocoSource
from captioning.sources.flickr import load_karpathy
from captioning.sources.table import Row, clean_captions, file_url, split_name, take_evenly


def load_coco(text: str, origin: str) -> tuple[list[dict[str, Any]], dict[int, list[str]]]:
    """Images (ordered by id) and captions by image id of a COCO captions file.

    Raises:
        CapstanError: not JSON, or not of COCO's form.
    """
    captions: dict[int, list[str]] = defaultdict(list)
    try:
        tree = json.loads(text)
        images = sorted(tree["images"], key=lambda image: image["id"])
        for image in images:
            image["file_name"]  # noqa: B018  must be there
        for annotation in tree["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CapstanError(f"{origin} is not a COCO captions file: {error!r}. Fetch it again.") from None
    return images, captions


def _location(image: dict[str, Any], root: Path | None, part: str) -> tuple[str, str]:
    """(published address, what to fetch): the local file where there is one."""
    name = Path(image["file_name"]).name
    url = image.get("coco_url") or f"http://images.cocodataset.org/{part}/{name}"
    for folder in (part, f"images/{part}", "images", "."):
        if root is not None and (root / folder / name).is_file():
            return url, file_url(root / folder / name)
    return url, url


def _splits(settings: CocoSource, images: dict[str, list[dict[str, Any]]]) -> dict[int, str]:
    """The split of each image id: Karpathy's, or train as train and every other image of val as test."""
    if settings.splits is not None:
        karpathy = load_karpathy(archives.locate(settings.splits, settings.root), "dataset_coco.json")
        try:
            return {int(image["cocoid"]): split_name(image["split"], "dataset_coco.json") for image in karpathy}
        except KeyError:
            raise CapstanError("dataset_coco.json has an image without cocoid: is it COCO's split file?") from None
    halves = {image["id"]: ("val", "test")[number % 2] for number, image in enumerate(images["val"])}
    return {image["id"]: "train" for image in images["train"]} | halves


def coco_rows(source: str, year: int, settings: CocoSource, folder: Path, seed: int) -> list[Row]:
    """Images of train, then val, by id; with Karpathy's file, those that it lists (`restval` is train)."""
    path = archives.locate(settings.annotations, settings.root)
    images: dict[str, list[dict[str, Any]]] = {}
    captions: dict[int, list[str]] = {}
    for part in ("train", "val"):
        name = f"captions_{part}{year}.json"
        images[part], found = load_coco(archives.read_text(path, name), name)
        captions |= found
    splits = _splits(settings, images)
    chosen = [(image, part) for part, own in images.items() for image in own if image["id"] in splits]
    rows = []
    for image, part in take_evenly(chosen, settings.max_images):
        url, location = _location(image, settings.root, f"{part}{year}")
        texts = clean_captions(captions.get(image["id"], []))
        rows.append(Row(f"{source}/{image['id']}", source, splits[image["id"]], url, location, texts))
    return rows


coco2014_rows = partial(coco_rows, "coco2014", 2014)
coco2017_rows = partial(coco_rows, "coco2017", 2017)
