"""The peers of `make bench` are built of today's decoders and compute the same: else ratios say nothing."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from conftest import small_decoder

from benchmarks.references.tutorial import tutorial_beam_search, tutorial_loss
from benchmarks.workload import build, synthetic_batch
from captioning.beam_search import beam_search
from captioning.losses import cross_entropy

MODULES = sorted(path.stem for path in (Path(__file__).parents[1] / "benchmarks").glob("[!_]*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_can_be_imported(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")


def test_the_tutorials_loss_is_ours() -> None:
    decoder, batch = build().eval(), synthetic_batch(2)
    with torch.no_grad():
        ours = cross_entropy(decoder(batch), batch.packed_targets) / batch.num_tokens
        assert tutorial_loss(decoder, batch).item() == pytest.approx(ours.item(), abs=1e-5)


def test_the_tutorials_search_gives_our_captions() -> None:
    decoder = small_decoder("lstm-bahdanau")
    features = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = beam_search(decoder, features, 3, 8)
    assert tutorial_beam_search(decoder, features, 3, 8) == [hypothesis.token_ids for hypothesis in found]
