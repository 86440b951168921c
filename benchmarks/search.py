"""P2: beam search in batches beside one image at a time: `python -m benchmarks.search`. O(5 min)."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor

from benchmarks.measure import Row, in_turn, ratio, show
from benchmarks.references.tutorial import tutorial_beam_search
from benchmarks.workload import build, synthetic_batch
from captioning.beam_search import beam_search
from captioning.decoders import Decoder


def measure_search(num_images: int = 1000) -> Row:
    """P2: beam 5 in batches, beside one image at a time; the tutorials' scripts do that five times an image."""
    decoder = build().eval()
    with torch.no_grad():
        decoder.output.weight.mul_(20)  # an untrained model is indifferent; a trained one is not
    features = synthetic_batch(num_images).features

    def ours() -> list[list[int]]:
        return [hypothesis.token_ids for hypothesis in beam_search(decoder, features, 5, 20)]

    def one_by_one() -> list[list[int]]:
        return tutorial_beam_search(decoder, features, 5, 20)  # type: ignore[arg-type]

    pairs = list(zip(ours(), one_by_one(), strict=True))
    others = [i for i, (a, b) in enumerate(pairs) if a != b]
    times = in_turn({"ours": ours, "one image at a time": one_by_one}, repeats=1, warm=True)
    single = ratio(times, "one image at a time", "ours")
    return {
        "work": f"P2 beam 5, {num_images} images, at most 20 words, fp32",
        "times": times,
        "ratios": {"one image at a time / ours": single, "tutorial (once a reference: 5 ×) / ours": 5 * single},
        "check": {
            "identical captions": f"{num_images - len(others)}/{num_images}",
            "the others in float64, identical": f"{_same_in_float64(decoder, features[others])}/{len(others)}",
        },
    }


def _same_in_float64(decoder: Decoder, features: Tensor) -> int:
    """Of captions that float32 tells apart, how many are one where rounding decides no tie."""
    exact, features = deepcopy(decoder).double(), features.double()
    one_by_one = tutorial_beam_search(exact, features, 5, 20)  # type: ignore[arg-type]
    found = beam_search(exact, features, 5, 20) if len(features) else []
    return sum(ours.token_ids == theirs for ours, theirs in zip(found, one_by_one, strict=True))


if __name__ == "__main__":
    show(measure_search())
