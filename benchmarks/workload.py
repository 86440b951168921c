"""What the benchmarks train and search with: features and captions of Flickr8k's sizes, drawn from a fixed seed."""

from __future__ import annotations

import random

import torch

from captioning.datasets import Batch, collate
from captioning.decoders import Decoder, DecoderConfig, build_decoder
from captioning.vocabulary import Vocabulary

NUM_REGIONS, ENCODER_DIM, VOCABULARY_SIZE = 49, 1280, 2500


def synthetic_batch(num_images: int) -> Batch:
    """Five captions an image with the lengths of Flickr8k's: mean 10.8, standard deviation 3.8."""
    draw = random.Random(0)
    captions = [
        [
            [draw.randrange(4, VOCABULARY_SIZE) for _ in range(min(23, max(2, round(draw.gauss(10.8, 3.8)))))]
            for _ in range(5)
        ]
        for _ in range(num_images)
    ]
    features = torch.randn(num_images, NUM_REGIONS, ENCODER_DIM, generator=torch.Generator().manual_seed(0)).relu()
    return collate(features, captions, Vocabulary)


def build(attention: str = "bahdanau") -> Decoder:
    torch.manual_seed(0)
    return build_decoder(
        DecoderConfig(
            type="lstm",
            attention=attention,
            context_gate=attention == "bahdanau",
            vocabulary_size=VOCABULARY_SIZE,
            encoder_dim=ENCODER_DIM,
            embedding_dim=512,
            hidden_dim=512,
            attention_dim=512,
            region_dim=512,
            dropout=0.0,
        )
    )
