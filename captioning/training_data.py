"""What a decoder is trained and validated on: cached features, or images from the shards, with their captions."""

from __future__ import annotations

from pathlib import Path

from captioning.annotations import Annotation, load_annotations
from captioning.augmentation import Augmenter
from captioning.datasets import CaptionBatches, FeatureStore
from captioning.encoders import Encoder
from captioning.evaluation import GreedyCider
from captioning.live import ImageStore, LiveBatches
from captioning.train_params import TrainParams
from captioning.vocabulary import Vocabulary

Data = tuple[CaptionBatches, CaptionBatches, GreedyCider]
"""Train, validation, and validation's metric."""


def load_data(prepared: Path, folder: Path, encoder: Encoder, vocabulary: Vocabulary, settings: TrainParams) -> Data:
    """All batches hold one image until `resolving.set_sizes`.

    Args:
        prepared: of the stage `prepare`.
        folder: features, or shards in live mode.

    Raises:
        CapstanError: something is missing or does not fit.
        DamagedError: other bytes than were written.
    """
    annotations = {split: load_annotations(prepared / f"{split}.json") for split in ("train", "val")}
    load = _load_live if settings.encoder_mode == "live" else _load_cached
    batches = load(annotations, folder, encoder, vocabulary, settings)
    references = [annotation.captions for annotation in annotations["val"]]
    cider = GreedyCider(batches["val"].store, references, vocabulary, 1)
    return batches["train"], batches["val"], cider


def _load_cached(
    annotations: dict[str, list[Annotation]],
    folder: Path,
    encoder: Encoder,
    vocabulary: Vocabulary,
    settings: TrainParams,
) -> dict[str, CaptionBatches]:
    return {
        split: CaptionBatches(FeatureStore(folder, found, verify=True), found, vocabulary, 1)
        for split, found in annotations.items()
    }


def _load_live(
    annotations: dict[str, list[Annotation]],
    folder: Path,
    encoder: Encoder,
    vocabulary: Vocabulary,
    settings: TrainParams,
) -> dict[str, CaptionBatches]:
    augmenter = Augmenter(settings.augmentation, settings.seed, 1) if settings.augmentation else None
    augmenters = {"train": augmenter, "val": None}
    return {
        split: LiveBatches(ImageStore(folder, found, encoder, augmenters[split]), found, vocabulary, 1)
        for split, found in annotations.items()
    }
