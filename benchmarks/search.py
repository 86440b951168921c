"""P2: beam search in batches beside one image at a time: `python -m benchmarks.search`. O(5 min)."""

from __future__ import annotations

import torch

from benchmarks.measure import Row, in_turn, ratio, show
from benchmarks.references.tutorial import tutorial_beam_search
from benchmarks.workload import build, synthetic_batch
from captioning.beam_search import beam_search


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

    found = {"ours": ours(), "one image at a time": one_by_one()}
    same = sum(a == b for a, b in zip(*found.values(), strict=True))
    times = in_turn({"ours": ours, "one image at a time": one_by_one}, repeats=1, warm=True)
    single = ratio(times, "one image at a time", "ours")
    return {
        "work": f"P2 beam 5, {num_images} images, at most 20 words, fp32",
        "times": times,
        "ratios": {"one image at a time / ours": single, "tutorial (once a reference: 5 ×) / ours": 5 * single},
        "check": {"identical captions": f"{same}/{num_images}"},
    }


if __name__ == "__main__":
    show(measure_search())
