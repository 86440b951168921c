"""The annotation: one image of one split with its captions, and the boxes of what they name where they are known."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from captioning.errors import CapstanError


class NamedBox(BaseModel):
    """Where the thing that a caption names was drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    words: list[str]
    """Words that name it in captions, lower case; for example `["circle", "disc"]`."""
    box: tuple[float, float, float, float]
    """(left, top, right, bottom) as fractions of the image's width and height, in [0, 1]."""


class Annotation(BaseModel):
    """One image. `shard` and `key` say where its bytes lie in data/shards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_id: str
    """`<source>/<the source's own id>`, unique over all sources."""
    source: str
    split: str
    """train, val or test."""
    shard: str
    key: str
    captions: list[str]
    boxes: list[NamedBox] = []


_LIST = TypeAdapter(list[Annotation])


def load_annotations(path: Path) -> list[Annotation]:
    """Reads a split's annotations.

    Raises:
        CapstanError: the file is not what `prepare` writes.
    """
    try:
        return _LIST.validate_json(path.read_bytes())
    except ValidationError as error:
        raise CapstanError(f"{path} is damaged: {error.errors()[0]['msg']}. Run `dvc repro prepare`.") from None


def dump_annotations(annotations: list[Annotation]) -> list[dict[str, object]]:
    """Plain values for `storage.write_json`."""
    return _LIST.dump_python(annotations, mode="json")


class ImageRecord(BaseModel):
    """An image without its captions: what stages that must not see the test split's captions read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_id: str
    source: str
    split: str
    shard: str
    key: str


_IMAGES = TypeAdapter(list[ImageRecord])


def load_images(path: Path) -> list[ImageRecord]:
    """Reads data/prepared/images.json. Raises CapstanError where it is damaged."""
    try:
        return _IMAGES.validate_json(path.read_bytes())
    except ValidationError as error:
        raise CapstanError(f"{path} is damaged: {error.errors()[0]['msg']}. Run `dvc repro prepare`.") from None
