"""The small BLIP that is built from `BlipConfig` and trained here from scratch, so that `blip` needs no network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captioning import storage
from captioning.blip import BlipCaptioner, Decoded
from captioning.errors import CapstanError
from captioning.params import SmallBlip
from captioning.precision import autocast, choose_device, choose_precision
from captioning.progress import Progress
from captioning.schedules import cosine_with_warmup
from captioning.vocabulary import Vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray

DROPOUT = 0.1
LABEL_SMOOTHING = 0.1
BETAS = (0.9, 0.98)
CLIP_NORM = 1.0
WEIGHT_STD = 0.02
"""Of fresh weights. BlipConfig's own for the vision part, 1e-10, is meant to be loaded over and learns nothing."""
IGNORED_LABEL = -100


def build_small_blip(settings: SmallBlip, vocabulary: Vocabulary, max_length: int) -> Any:
    """A `BlipForConditionalGeneration` over our word vocabulary, its weights drawn from torch's global generator.

    Args:
        max_length: the longest caption in words, with its prompt.

    Raises:
        CapstanError: sizes that do not divide each other.
    """
    from transformers import BlipConfig, BlipForConditionalGeneration

    for small, large in (("patch_px", "image_px"), ("num_heads", "hidden_dim")):
        part, whole = getattr(settings, small), getattr(settings, large)
        if whole % part:
            raise CapstanError(f"blip.small.{large} ({whole}) must be a multiple of blip.small.{small} ({part})")
    size = {
        "hidden_size": settings.hidden_dim,
        "intermediate_size": 4 * settings.hidden_dim,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "projection_dim": settings.hidden_dim,
        "initializer_range": WEIGHT_STD,
    }
    vision = {**size, "image_size": settings.image_px, "patch_size": settings.patch_px}
    text = {
        **size,
        "vocab_size": len(vocabulary),
        "encoder_hidden_size": settings.hidden_dim,
        "max_position_embeddings": max_length + 2,  # bos and eos
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": vocabulary.eos_id,
        "sep_token_id": vocabulary.eos_id,  # what BLIP's generate ends at
        "pad_token_id": vocabulary.pad_id,
        "hidden_dropout_prob": DROPOUT,
        "label_smoothing": LABEL_SMOOTHING,
    }
    return BlipForConditionalGeneration(
        BlipConfig(vision_config=vision, text_config=text, projection_dim=settings.hidden_dim)
    )


def resize(pixels: NDArray[np.uint8], image_px: int) -> NDArray[np.uint8]:
    """(height, width, 3) to (image_px, image_px, 3), both uint8; the aspect ratio is not kept, as in BLIP."""
    return np.asarray(Image.fromarray(pixels).resize((image_px, image_px), Image.Resampling.BICUBIC))


def normalise(pixels: Tensor) -> Tensor:
    """(batch, image_px, image_px, 3) uint8 to (batch, 3, image_px, image_px) float32 in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def store_pixels(target: Path, images: Decoded, rows: dict[str, int], image_px: int) -> NDArray[np.uint8]:
    """Decodes once into a file, which is mapped, so that training needs no memory for the data set.

    Args:
        rows: each image_id's row.

    Returns:
        (num_images, image_px, image_px, 3) uint8.
    """
    if not target.exists():
        with storage.atomic_write(target) as temporary, Progress("blip decode", len(rows), "image") as progress:
            pixels = np.lib.format.open_memmap(
                temporary, mode="w+", dtype=np.uint8, shape=(len(rows), image_px, image_px, 3)
            )
            for image, decoded in images:
                pixels[rows[image.image_id]] = resize(decoded, image_px)
                progress.update()
            pixels.flush()
            del pixels
    return np.load(target, mmap_mode="r", allow_pickle=False)


def train_small_blip(
    model: Any,
    pixels: NDArray[np.uint8],
    captions: Sequence[Sequence[Sequence[int]]],
    settings: SmallBlip,
    batch_size: int,
    precision: str,
    seed: int,
) -> list[float]:
    """Trains in place by teacher forcing, an image encoded once for all its captions; returns each epoch's mean loss.

    AdamW, linear warm-up, cosine to zero. The order and the captions drawn are a pure function of (seed, epoch).

    Args:
        pixels: (num_images, image_px, image_px, 3) uint8.
        captions: per image, per caption, its word ids without bos and eos.

    Raises:
        CapstanError: fp16 (it would need loss scaling), or a loss that is not finite.
    """
    if precision == "fp16":
        raise CapstanError("blip.precision: fp16 cannot train the small BLIP; take bf16, fp32 or auto")
    device = choose_device()
    dtype = choose_precision(precision, device)
    dtype = torch.float32 if dtype == torch.float16 else dtype
    model.to(device).train()
    num_steps = math.ceil(len(captions) / batch_size) * settings.num_epochs
    optimizer = _build_optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine_with_warmup(step, settings.warmup_steps, num_steps)
    )

    def take_step(indices: NDArray[np.int64], texts: Sequence[Sequence[Sequence[int]]]) -> float:
        with autocast(device, dtype):
            loss = _loss(model, torch.from_numpy(pixels[indices]), texts, device)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
        return loss.item()

    epoch_losses = []
    with Progress("blip train", num_steps, "step") as progress:
        for epoch in range(settings.num_epochs):
            losses = []
            for indices, texts in _draw_batches(captions, batch_size, settings.captions_per_step, seed, epoch):
                losses.append(take_step(indices, texts))
                progress.update(note=f"epoch {epoch + 1}/{settings.num_epochs}, loss {losses[-1]:.3f}")
            epoch_losses.append(sum(losses) / len(losses))
            if not math.isfinite(epoch_losses[-1]):
                raise CapstanError(f"the small BLIP's loss became {epoch_losses[-1]}: lower blip.small.learning_rate")
    model.eval()
    return epoch_losses


def _draw_batches(
    captions: Sequence[Sequence[Sequence[int]]], batch_size: int, captions_per_step: int, seed: int, epoch: int
) -> Iterator[tuple[NDArray[np.int64], list[list[Sequence[int]]]]]:
    """An epoch's batches: the images' rows, sorted for reading, and at most `captions_per_step` captions of each."""
    draw = np.random.default_rng([seed, epoch])
    order = draw.permutation(len(captions))
    for start in range(0, len(order), batch_size):
        indices = np.sort(order[start : start + batch_size])
        chosen = [draw.permutation(len(captions[i]))[:captions_per_step] for i in indices]
        yield indices, [[captions[i][c] for c in numbers] for i, numbers in zip(indices, chosen, strict=True)]


def _build_optimizer(model: Any, settings: SmallBlip) -> torch.optim.AdamW:
    """Weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=BETAS, fused=True
    )


def _loss(
    model: Any,
    pixels: Tensor,
    captions: Sequence[Sequence[Sequence[int]]],
    device: torch.device,
) -> Tensor:
    """Mean cross entropy over the words and eos of all captions of the images."""
    text = model.config.text_config
    owners = torch.tensor([image for image, group in enumerate(captions) for _ in group], device=device)
    texts = [torch.tensor([text.bos_token_id, *ids, text.eos_token_id]) for group in captions for ids in group]
    token_ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=text.pad_token_id).to(device)
    real = token_ids != text.pad_token_id  # (num_captions, steps)
    regions = model.vision_model(normalise(pixels.to(device)))[0]  # (images, num_regions, hidden_dim)
    return model.text_decoder(
        input_ids=token_ids,
        attention_mask=real.long(),
        encoder_hidden_states=regions[owners],
        labels=token_ids.masked_fill(~real, IGNORED_LABEL),
        reduction="mean",
    ).loss


def as_captioner(model: Any, settings: SmallBlip, vocabulary: Vocabulary, prompt: str) -> BlipCaptioner:
    """The trained model as a captioner; `prompt` is what each caption begins with."""
    start = [vocabulary.bos_id, *vocabulary.encode(prompt), vocabulary.eos_id]  # generate drops the last

    def preprocess(images: list[NDArray[np.uint8]]) -> dict[str, Tensor]:
        pixels = torch.from_numpy(np.stack([resize(image, settings.image_px) for image in images]))
        return {"pixel_values": normalise(pixels), "input_ids": torch.tensor([start] * len(images))}

    return BlipCaptioner(model.eval(), preprocess, vocabulary.decode)
