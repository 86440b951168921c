"""The small BLIP that is built from `BlipConfig` and trained here from scratch, so that `blip` needs no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captioning import monitoring, storage
from captioning.blip import BlipCaptioner, Decoded
from captioning.distributed import ALONE
from captioning.errors import CapstanError
from captioning.loop import Outcome
from captioning.optimization import Stepper, build_adamw, seed_step
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
MAX_SKIPPED_STEPS = 20
"""So many steps in a row whose loss or gradient is not finite, and training stops."""

Batch = tuple["NDArray[np.int64]", list[list[Sequence[int]]]]
"""Rows of images, and the captions of each that were drawn."""


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


def store_pixels(target: Path, decode: Callable[[], Decoded], rows: dict[str, int], image_px: int) -> NDArray[np.uint8]:
    """Decodes once into a file, which is mapped, so that training needs no memory for the data set.

    One that an earlier run left is taken if its digest, kept beside it, is right; else it is set aside.

    Args:
        decode: begins to decode the images.
        rows: each image_id's row.

    Returns:
        (num_images, image_px, image_px, 3) uint8.
    """
    if not _is_whole(target):
        with storage.atomic_write(target) as temporary, Progress("blip decode", len(rows), "image") as progress:
            pixels = np.lib.format.open_memmap(
                temporary, mode="w+", dtype=np.uint8, shape=(len(rows), image_px, image_px, 3)
            )
            for image, decoded in decode():
                pixels[rows[image.image_id]] = resize(decoded, image_px)
                progress.update()
            pixels.flush()
            del pixels
            storage.write_part(_note(target), [storage.digest_file(temporary)], target.name)
    return np.load(target, mmap_mode="r", allow_pickle=False)


def _note(target: Path) -> Path:
    return target.with_suffix(".digest")


def _is_whole(target: Path) -> bool:
    if not target.exists():
        return False
    if storage.read_part(_note(target), target.name) == [storage.digest_file(target)]:
        return True
    storage.set_aside(target)
    return False


class BlipTask:
    """The small BLIP's training, as `captioning.loop` runs it: teacher forcing, an image encoded once for its captions.

    AdamW, linear warm-up, cosine to zero. The order and the captions drawn are a pure function of (seed, epoch).
    """

    name = "blip train"

    def __init__(
        self,
        model: Any,
        load_pixels: Callable[[], NDArray[np.uint8]],
        captions: Sequence[Sequence[Sequence[int]]],
        settings: SmallBlip,
        batch_size: int,
        precision: str,
        seed: int,
    ) -> None:
        """
        Args:
            load_pixels: gives (num_images, image_px, image_px, 3) uint8; called only if there is a step to do.
            captions: per image, per caption, its word ids without bos and eos.
        """
        self.device = choose_device()
        self.dtype = choose_precision(precision, self.device)
        self.model = model.to(self.device)
        self.captions, self.settings, self.batch_size, self.seed = captions, settings, batch_size, seed
        self.num_epochs, self.steps_per_epoch = settings.num_epochs, math.ceil(len(captions) / batch_size)
        optimizer = build_adamw(
            [(list(model.named_parameters()), settings.learning_rate)], settings.weight_decay, BETAS
        )
        self.stepper = Stepper(optimizer, CLIP_NORM, self.dtype, ALONE)
        self.losses: list[float] = []
        """Each epoch's mean."""
        self._load_pixels = load_pixels

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        return self._load_pixels()

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        drawn = _draw_batches(self.captions, self.batch_size, self.settings.captions_per_step, self.seed, epoch)
        return islice(drawn, first, None)

    def train_step(self, batch: Batch, step: int, stop: bool) -> Outcome:
        """The loss is the mean over the batch's words."""
        indices, texts = batch
        self.model.train()
        seed_step(self.seed, step, ALONE.rank)
        factor = cosine_with_warmup(step, self.settings.warmup_steps, self.num_epochs * self.steps_per_epoch)
        with autocast(self.device, self.dtype):
            loss = _loss(self.model, torch.from_numpy(self.pixels[indices]), texts, self.device)
        value, finite, stop = self.stepper.step(loss, factor, stop)
        monitoring.count(images=len(texts), tokens=sum(len(words) + 1 for group in texts for words in group))
        return Outcome(value, 1, finite, stop)

    def evaluate(self) -> None:
        """There is nothing to choose by: the last epoch's weights are taken."""

    def end_epoch(self, epoch: int, step: int, mean_loss: float, found: None) -> str:
        self.losses.append(mean_loss)
        return f"loss {mean_loss:.3f}"

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "stepper": self.stepper.state_dict(), "losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.stepper.load_state_dict(state["stepper"])
        self.losses = list(state["losses"])


def _draw_batches(
    captions: Sequence[Sequence[Sequence[int]]], batch_size: int, captions_per_step: int, seed: int, epoch: int
) -> Iterator[Batch]:
    """An epoch's batches: the images' rows, sorted for reading, and at most `captions_per_step` captions of each."""
    draw = np.random.default_rng([seed, epoch])
    order = draw.permutation(len(captions))
    for start in range(0, len(order), batch_size):
        indices = np.sort(order[start : start + batch_size])
        chosen = [draw.permutation(len(captions[i]))[:captions_per_step] for i in indices]
        yield indices, [[captions[i][c] for c in numbers] for i, numbers in zip(indices, chosen, strict=True)]


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
