"""BLIP as a captioner: pretrained weights from a hub or a local folder, and captions for images in batches.

Li, Li, Xiong, Hoi: "BLIP: Bootstrapping Language-Image Pre-training" (ICML 2022). The small one that is trained here is
built by `captioning.blip_training`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from captioning.annotations import Annotation, ImageRecord
from captioning.errors import CapstanError
from captioning.images import decode_image
from captioning.precision import autocast, choose_device, choose_precision
from captioning.progress import Progress
from captioning.shards import iterate_shard

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TRAIN = "train"
"""The value of blip.weights that asks for the small BLIP trained here."""

HUB_FILES = ["*.json", "*.txt", "model*.safetensors"]
"""What is taken from a hub repository: no code, no pickles, no other frameworks' weights."""

Decoded = Iterator[tuple[Annotation | ImageRecord, "NDArray[np.uint8]"]]
"""Images with their pixels, (height, width, 3) RGB uint8 each."""


@dataclass(frozen=True)
class BlipCaptioner:
    """A model in evaluation mode with what stands before and after it."""

    model: Any
    """`transformers.BlipForConditionalGeneration`."""
    preprocess: Callable[[list[NDArray[np.uint8]]], dict[str, torch.Tensor]]
    """Images, each (height, width, 3) RGB uint8, to `generate`'s inputs: pixel_values, and the prompt's ids if any."""
    decode: Callable[[list[int]], str]
    """Generated token ids to a caption."""


def iterate_images(shards: Path, images: Sequence[Annotation | ImageRecord]) -> Decoded:
    """Decodes images shard after shard, in the order of shards and keys.

    Raises:
        CapstanError: a shard is missing or damaged, or does not hold an image that it should.
    """
    by_shard: dict[str, dict[str, Annotation | ImageRecord]] = {}
    for image in images:
        by_shard.setdefault(image.shard, {})[image.key] = image
    for shard, wanted in sorted(by_shard.items()):
        path = shards / f"{shard}.tar"
        if not path.exists():
            raise CapstanError(f"{path} is missing: run `dvc repro download`, or `dvc pull {shards}`")
        for key, jpeg, _ in iterate_shard(path):
            if key in wanted:
                yield wanted.pop(key), decode_image(jpeg)
        if wanted:
            raise CapstanError(f"{path} lacks {len(wanted)} images ({min(wanted)}, …): run `dvc repro prepare`")


def load_pretrained(weights: str, prompt: str) -> BlipCaptioner:
    """A BLIP with its processor, from a local folder or by its name on the Hugging Face hub (or in its local cache).

    Only safetensors are read, no code of the repository is run, and every weight must be there.

    Raises:
        CapstanError: the weights cannot be had, are damaged, are not BLIP's, or do not fill the model.
    """
    from safetensors import SafetensorError
    from transformers import BlipForConditionalGeneration, BlipProcessor

    folder = _fetch(weights)
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = BlipProcessor.from_pretrained(folder, **safe)
        loaded: Any = BlipForConditionalGeneration.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **safe
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CapstanError(
            f"blip.weights: {folder} holds no usable BLIP ({_brief(error)}). It needs config.json, model.safetensors, "
            "preprocessor_config.json and the tokenizer's files, as `save_pretrained` writes them."
        ) from error
    model, report = loaded
    if missing := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise CapstanError(f"blip.weights: {weights} does not fill BLIP ({len(missing)} weights, such as {missing[0]})")

    def preprocess(images: list[NDArray[np.uint8]]) -> dict[str, torch.Tensor]:
        text = [prompt] * len(images) if prompt else None
        pixels = [image.copy() for image in images]  # torch wants arrays that it may write to
        return dict(processor(images=pixels, text=text, return_tensors="pt"))

    def decode(token_ids: list[int]) -> str:
        return " ".join(processor.decode(token_ids, skip_special_tokens=True).split())

    return BlipCaptioner(model.eval(), preprocess, decode)


def _fetch(weights: str) -> Path:
    """The local folder of that name, else the hub repository's files, downloaded unless they are in its cache.

    Raises:
        CapstanError: no such folder, and not to be had from the hub.
    """
    if Path(weights).is_dir():
        return Path(weights)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(weights, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        raise CapstanError(
            f"blip.weights: {weights} is neither a local folder nor to be had from the Hugging Face hub "
            f"({_brief(error)}). Where there is a network, fetch it into the hub's cache with `hf download {weights}` "
            "(HF_HOME says where that is), or copy the repository's files into a folder and name that folder in "
            f"blip.weights; `{TRAIN}` trains a small BLIP here instead."
        ) from error


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def caption_images(
    captioner: BlipCaptioner,
    images: Decoded,
    num_images: int,
    batch_size: int,
    precision: str,
    num_beams: int,
    max_length: int,
) -> dict[str, str]:
    """Captions by image_id. A caption that has not ended after `max_length` tokens is cut there."""
    device = choose_device()
    dtype = choose_precision(precision, device)
    captioner.model.to(device)
    options = {"num_beams": num_beams, "max_new_tokens": max_length, "do_sample": False}
    captions: dict[str, str] = {}
    with Progress("blip captions", num_images, "image") as progress, torch.inference_mode():
        for batch in _batches(images, batch_size):
            inputs = captioner.preprocess([pixels for _, pixels in batch])
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            with autocast(device, dtype):
                rows = captioner.model.generate(**inputs, **options)
            for (image, _), row in zip(batch, rows.tolist(), strict=True):
                captions[image.image_id] = captioner.decode(row)
            progress.update(len(batch))
    return captions


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
