"""From the ledger of shards to annotations, vocabulary and statistics."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from captioning import shards
from captioning.annotations import Annotation, NamedBox
from captioning.errors import CapstanError
from captioning.paths import SPLITS
from captioning.sentences import first_sentences
from captioning.tokenization import start_vocabulary
from captioning.tokenizer_params import TokenizerSettings
from captioning.vocabulary import Vocabulary, clean_caption


def read_ledger(path: Path, lowercase: bool, max_sentences: int | None = None) -> list[Annotation]:
    """Annotations of all images that were fetched and have a caption with at least one word.

    Args:
        max_sentences: the first so many of each caption are kept; None: all.

    Raises:
        CapstanError: the ledger is damaged, an image id stands twice, or a split has no usable image.
    """
    annotations = []
    for row in shards.read_ledger(path):
        kept = [first_sentences(text, max_sentences) if max_sentences else text for text in row.captions]
        captions = [clean_caption(caption, lowercase) for caption in kept]
        captions = [caption for caption in captions if caption]
        if row.status == shards.SUCCESS and captions:
            boxes = [NamedBox.model_validate(box) for box in json.loads(row.boxes)]
            names: dict[str, Any] = {
                name: getattr(row, name) for name in ("image_id", "source", "split", "shard", "key")
            }
            annotations.append(Annotation(**names, captions=captions, boxes=boxes))
    counts = Counter(annotation.image_id for annotation in annotations)
    twice = [image_id for image_id, count in counts.items() if count > 1]
    if twice:
        raise CapstanError(f"{path}: {len(twice)} image ids stand more than once ({', '.join(twice[:3])})")
    for split in SPLITS:
        if not any(annotation.split == split for annotation in annotations):
            raise CapstanError(f"no usable image in the {split} split: check data.sources and their split settings")
    return annotations


def build_vocabulary(
    train: list[Annotation], tokenizer: TokenizerSettings, max_length_percentile: float, lowercase: bool
) -> Vocabulary:
    """The train split's vocabulary, with the maximum caption length, in tokens, at a percentile of the train captions'
    lengths."""
    captions = [caption for annotation in train for caption in annotation.captions]
    vocabulary = start_vocabulary(captions, tokenizer, max_length=1, lowercase=lowercase)
    lengths = [len(vocabulary.encode(caption)) for caption in captions]
    vocabulary.max_length = int(np.ceil(np.percentile(lengths, max_length_percentile)))
    return vocabulary


def summarise(annotations: list[Annotation], vocabulary: Vocabulary) -> dict[str, Any]:
    """Statistics of one set of annotations; only numbers, so that `dvc metrics diff` shows them.

    All count words, whatever the tokenizer, but `mean_tokens`, and `too_long_rate`: what training cuts off.
    """
    texts = [caption for annotation in annotations for caption in annotation.captions]
    captions = [caption.split() for caption in texts]
    num_tokens = np.array([len(vocabulary.encode(caption)) for caption in texts])
    lengths = np.array([len(words) for words in captions])
    words = [word for caption in captions for word in caption]
    return {
        "num_images": len(annotations),
        "num_captions": len(captions),
        "captions_per_image": round(len(captions) / len(annotations), 3),
        "num_words": len(words),
        "num_distinct_words": len(set(words)),
        "mean_length": round(float(lengths.mean()), 3),
        "mean_tokens": round(float(num_tokens.mean()), 3),
        "median_length": float(np.median(lengths)),
        "max_length": int(lengths.max()),
        "too_long_rate": round(float((num_tokens > vocabulary.max_length).mean()), 6),
        "unknown_rate": round(sum(word not in vocabulary for word in words) / len(words), 6),
        "length_histogram": {str(length): count for length, count in sorted(Counter(lengths.tolist()).items())},
    }


def statistics(annotations: list[Annotation], vocabulary: Vocabulary) -> dict[str, Any]:
    """Vocabulary figures, then `summarise` by split and, within `sources`, by source and split."""
    by_split = {split: [a for a in annotations if a.split == split] for split in SPLITS}
    sources = sorted({annotation.source for annotation in annotations})
    train_words = {word for a in by_split["train"] for caption in a.captions for word in caption.split()}
    known = sum(word in vocabulary for word in train_words)
    return {
        "vocabulary": {
            "size": len(vocabulary),
            "max_length": vocabulary.max_length,
            "coverage_of_distinct_words": round(known / len(train_words), 6),
        },
        **{split: summarise(members, vocabulary) for split, members in by_split.items()},
        "sources": {
            source: {
                split: summarise(part, vocabulary)
                for split in SPLITS
                if (part := [a for a in by_split[split] if a.source == source])
            }
            for source in sources
        },
    }


def choose_samples(test: list[Annotation], num_samples: int, seed: int) -> list[Annotation]:
    """Test images for the report: drawn evenly from the sources, the same for the same seed."""
    generator = np.random.default_rng(seed)
    by_source: dict[str, list[Annotation]] = {}
    for annotation in sorted(test, key=lambda a: a.image_id):
        by_source.setdefault(annotation.source, []).append(annotation)
    queues = [[members[i] for i in generator.permutation(len(members))] for members in by_source.values()]
    chosen: list[Annotation] = []
    while len(chosen) < num_samples and any(queues):
        for queue in queues:
            if queue and len(chosen) < num_samples:
                chosen.append(queue.pop())
    return sorted(chosen, key=lambda a: a.image_id)
