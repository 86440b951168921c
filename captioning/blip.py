"""BLIP as a captioner: pretrained weights from a folder, and captions for images in batches.

Li, Li, Xiong, Hoi: "BLIP: Bootstrapping Language-Image Pre-training" (ICML 2022). The small one that is trained here is
built by `captioning.blip_training`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from captioning import monitoring, storage
from captioning.annotations import Annotation, ImageRecord
from captioning.errors import CapstanError, brief
from captioning.images import decode_image
from captioning.precision import autocast, choose_device, choose_precision
from captioning.progress import Progress
from captioning.shards import iterate_shard, verify_shards

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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
    """Decodes images shard after shard, in the order of shards and keys, after all these shards were verified.

    Raises:
        CapstanError: a shard is missing or damaged (then it is set aside), or does not hold an image that it should.
    """
    by_shard: dict[str, dict[str, Annotation | ImageRecord]] = {}
    for image in images:
        by_shard.setdefault(image.shard, {})[image.key] = image
    verify_shards(shards, by_shard)
    for shard, wanted in sorted(by_shard.items()):
        path = shards / f"{shard}.tar"
        for key, jpeg, _ in iterate_shard(path):
            if key in wanted:
                yield wanted.pop(key), decode_image(jpeg)
        if wanted:
            raise CapstanError(f"{path} lacks {len(wanted)} images ({min(wanted)}, …): run `dvc repro prepare`")


def load_pretrained(folder: Path, prompt: str) -> BlipCaptioner:
    """A BLIP with its processor, from a folder as `save_pretrained` writes it.

    Only safetensors are read, no code of the repository is run, and every weight must be there.

    Raises:
        CapstanError: the weights are not there, are damaged, are not BLIP's, or do not fill the model.
    """
    from safetensors import SafetensorError
    from transformers import BlipForConditionalGeneration, BlipProcessor

    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = BlipProcessor.from_pretrained(folder, **safe)
        loaded: Any = BlipForConditionalGeneration.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **safe
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CapstanError(
            f"blip.weights: {folder} holds no usable BLIP ({brief(error)}). It needs config.json, model.safetensors, "
            "preprocessor_config.json and the tokenizer's files, as `save_pretrained` writes them."
        ) from error
    model, report = loaded
    if missing := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise CapstanError(f"blip.weights: {folder} does not fill BLIP ({len(missing)} weights, such as {missing[0]})")

    def preprocess(images: list[NDArray[np.uint8]]) -> dict[str, torch.Tensor]:
        text = [prompt] * len(images) if prompt else None
        pixels = [image.copy() for image in images]  # torch wants arrays that it may write to
        return dict(processor(images=pixels, text=text, return_tensors="pt"))

    def decode(token_ids: list[int]) -> str:
        return " ".join(processor.decode(token_ids, skip_special_tokens=True).split())

    return BlipCaptioner(model.eval(), preprocess, decode)


def caption_images(
    build: Callable[[], BlipCaptioner],
    shards: Path,
    images: Sequence[Annotation | ImageRecord],
    parts: Path,
    *,
    prompt: str,
    batch_size: int,
    precision: str,
    num_beams: int,
    max_length: int,
) -> dict[str, str]:
    """Captions by image_id. A caption that has not ended after `max_length` tokens is cut there.

    Each batch is kept in `parts` when it is done. One that is found there is neither decoded nor captioned again.

    Args:
        build: gives the captioner; called only if a batch is missing.
        parts: a folder that belongs to this captioner.
        prompt: what the captioner puts before each caption.
    """
    dtype = choose_precision(precision, choose_device())
    options = [prompt, batch_size, str(dtype), num_beams, max_length]
    ordered = sorted(images, key=lambda image: (image.shard, image.key))
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    targets = [parts / f"{number:05d}.jsonl" for number in range(len(batches))]
    abouts = [[*options, [image.image_id for image in batch]] for batch in batches]
    found = [storage.read_part(target, about) for target, about in zip(targets, abouts, strict=True)]
    missing = [number for number, captions in enumerate(found) if captions is None]
    if len(missing) < len(batches):
        done = len(batches) - len(missing)
        print(f"resumed: {done} of {len(batches)} parts verified, {len(missing)} left", flush=True)
    if missing:
        captioner = build()
        decoded = iterate_images(shards, [image for number in missing for image in batches[number]])
        with Progress("blip captions", sum(len(batches[number]) for number in missing), "image") as progress:
            for number in missing:
                pixels = [pixels for _, pixels in islice(decoded, len(batches[number]))]
                found[number] = _caption_batch(captioner, pixels, dtype, num_beams, max_length)
                storage.write_part(targets[number], found[number] or [], abouts[number])
                progress.update(len(pixels))
                monitoring.count(images=len(pixels))
    texts = [caption for captions in found for caption in captions or []]
    return {image.image_id: caption for image, caption in zip(ordered, texts, strict=True)}


@torch.inference_mode()
def _caption_batch(
    captioner: BlipCaptioner, pixels: list[NDArray[np.uint8]], dtype: torch.dtype, num_beams: int, max_length: int
) -> list[str]:
    device = choose_device()
    captioner.model.to(device)
    inputs = {name: tensor.to(device) for name, tensor in captioner.preprocess(pixels).items()}
    with autocast(device, dtype):
        rows = captioner.model.generate(**inputs, num_beams=num_beams, max_new_tokens=max_length, do_sample=False)
    return [captioner.decode(row) for row in rows.tolist()]
