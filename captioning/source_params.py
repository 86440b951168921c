"""`source_settings` in params.yaml: what each source of images and captions can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from captioning.param_types import Fraction, Positive, Section


class DrawnSource(Section):
    """A source that Capstan draws itself (`shapes`, `digits`)."""

    num_images: Positive
    image_px: Annotated[int, Field(ge=64, le=1024)]
    captions_per_image: Annotated[int, Field(ge=4, le=10)]
    seed: int
    """Which images are drawn; a source's images do not depend on any other source."""
    val_fraction: Fraction
    test_fraction: Fraction


class Archive(Section):
    """A file to fetch: from `url`, or from the source's `root` under the URL's last component."""

    url: str
    sha256: str | None
    """Pinned checksum; null accepts any bytes (its digest is printed, to be pinned)."""


class FlickrSource(Section):
    """Flickr8k: the image archive and the text archive. Flickr30k: images, token file and Karpathy's JSON."""

    root: Path | None
    """Local folder that holds the archives (or their unpacked files); null downloads them."""
    images: Archive
    captions: Archive
    max_images: Positive | None
    """For a trial on a part of the data; null takes all."""


class Flickr30kSource(FlickrSource):
    splits: Archive


class CocoSource(Section):
    root: Path | None
    """Local folder with `annotations/` and image folders; images that are not there are fetched by `coco_url`."""
    annotations: Archive
    splits: Archive | None
    """Karpathy's dataset_coco.json (or the zip that holds it); null takes train as train, half of val as test."""
    max_images: Positive | None


class FolderSource(Section):
    """Your own images with a captions file."""

    root: Path
    captions_file: str
    """CSV or JSON below `root`: a row per image and caption."""
    image_column: str
    caption_column: str
    split_column: str | None
    """Column with train/val/test; null draws the splits by the fractions below."""
    val_fraction: Fraction
    test_fraction: Fraction


class UrlTableSource(Section):
    """A parquet or CSV of URLs and captions, such as LAION-COCO or RELAION-POP."""

    table: Path | str
    url_column: str
    caption_column: str
    id_column: str | None
    split_column: str | None
    val_fraction: Fraction
    test_fraction: Fraction
    max_images: Positive | None


class SourceSettings(Section):
    shapes: DrawnSource
    digits: DrawnSource
    flickr8k: FlickrSource
    flickr30k: Flickr30kSource
    coco2014: CocoSource
    coco2017: CocoSource
    folder: FolderSource
    url_table: UrlTableSource
