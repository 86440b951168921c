"""What each decoder × attention costs: captions/s in training and search, memory of a step. O(5 min) on 2 cores.

python -m benchmarks.decoders                       all of recipes/decoders.yaml
python -m benchmarks.decoders gru transformer       those whose names begin so; the others stay as they were measured
python -m benchmarks.decoders --table               writes the tables alone

Writes benchmarks/decoders.json, the table of costs in docs/decoders.md and that of torch.compile in docs/training.md.
A training step is forward pass, loss and backward pass, without the optimizer's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from torch import Tensor

from benchmarks.measure import in_turn, keep_row, read_rows
from benchmarks.pages import ROOT, replace_table
from benchmarks.recomputing import allocated
from benchmarks.workload import ENCODER_DIM, VOCABULARY_SIZE, synthetic_batch
from captioning.beam_search import beam_search
from captioning.compiling import Compilation
from captioning.decoders import Decoder, DecoderConfig, build_decoder
from captioning.distributed import ALONE
from captioning.penalties import loss_sum
from captioning.precision import keep_memory

RESULTS = Path(__file__).with_suffix(".json")
COSTS = "<!-- from benchmarks/decoders.json: `python -m benchmarks.decoders --table` -->"
COMPILED = "<!-- compiled, from benchmarks/decoders.json: `python -m benchmarks.decoders --table` -->"
NUM_IMAGES, NUM_CAPTIONS, NUM_SEARCHED, BEAM_SIZE, MAX_LENGTH, REPEATS = 16, 5, 64, 5, 20, 5
WAYS = ("plain", "checkpointed", "compiled")


def recipe_decoders() -> dict[str, dict[str, Any]]:
    """`decoder_settings` of recipes/decoders.yaml by name; the Transformer's are params.yaml's own."""
    load = YAML(typ="safe").load
    settings: dict[str, dict[str, Any]] = {}
    for file in ("params.yaml", "recipes/decoders.yaml"):
        settings |= load(ROOT / file)["decoder_settings"]
    return {name: dict(settings[name]) for name in load(ROOT / "recipes" / "decoders.yaml")["decoders"]}


def build(settings: dict[str, Any]) -> Decoder:
    torch.manual_seed(0)
    sizes = {name: value for name, value in settings.items() if name != "learning_rate"}
    return build_decoder(DecoderConfig(vocabulary_size=VOCABULARY_SIZE, encoder_dim=ENCODER_DIM, **sizes))


class Training:
    """A decoder's training step, in one of three ways."""

    def __init__(self, settings: dict[str, Any], way: str) -> None:
        self.decoder, self.batch = build(settings), synthetic_batch(NUM_IMAGES)
        self.decoder.checkpointed = way == "checkpointed"
        self.compilation = Compilation(self.decoder, self.loss, ALONE, way == "compiled", deterministic=True)
        self.compilation.prepare()

    def loss(self) -> Tensor:
        return loss_sum(self.decoder, self.batch, 0.1, None) / self.batch.num_tokens

    def step(self) -> None:
        self.decoder.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        self.loss().backward()

    def kept(self) -> Tensor:
        self.decoder.zero_grad(set_to_none=True)
        return self.loss()


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step each way, MB that it keeps for backward and takes at most; captions/s of beam search."""
    trainings = {way: Training(settings, way) for way in WAYS}
    times = in_turn({way: training.step for way, training in trainings.items()}, REPEATS)
    found: dict[str, Any] = {way: dict(values) for way, values in times.items()}
    for way in ("plain", "checkpointed"):
        training = trainings[way]
        found[way]["kept_mb"] = allocated(training.kept)[0]
        training.decoder.zero_grad(set_to_none=True)
        found[way]["peak_mb"] = allocated(training.step)[1]
    found["is_compiled"] = trainings["compiled"].compilation.used
    decoder = trainings["plain"].decoder
    found["weights_mb"] = sum(p.numel() * p.element_size() for p in decoder.parameters()) / 1e6
    return found | {"search_captions_per_s": _measure_search(decoder.eval())}


@torch.inference_mode()
def _measure_search(decoder: Decoder) -> float:
    """With an end that never comes, so that each decoder says as many words."""
    features = synthetic_batch(NUM_SEARCHED).features
    times = in_turn({"search": lambda: beam_search(decoder, features, BEAM_SIZE, MAX_LENGTH, min_length=MAX_LENGTH)}, 3)
    return NUM_SEARCHED / times["search"]["median_s"]


def build_costs(rows: dict[str, Any]) -> str:
    """Markdown, a decoder a line: plain → checkpointed."""
    lines = [
        "| decoder | weights, MB | training, captions/s | kept, MB | peak, MB | search, captions/s |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    captions = NUM_IMAGES * NUM_CAPTIONS
    for name, row in rows.items():
        plain, other = row["plain"], row["checkpointed"]
        speed = f"{captions / plain['median_s']:.0f} → {captions / other['median_s']:.0f}"
        memory = [f"{plain[key]:.0f} → {other[key]:.0f}" for key in ("kept_mb", "peak_mb")]
        cells = [f"`{name}`", f"{row['weights_mb']:.0f}", speed, *memory, f"{row['search_captions_per_s']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def build_compiled(rows: dict[str, Any]) -> str:
    """Markdown, a decoder a line: plain → compiled."""
    lines = ["| decoder | ms a step | speed |", "|:--|--:|--:|"]
    for name, row in rows.items():
        plain, other = (row[way]["median_s"] * 1000 for way in ("plain", "compiled"))
        said = f"{plain / other:.2f}×" if row["is_compiled"] else "not compiled"
        lines.append(f"| `{name}` | {plain:.0f} → {other:.0f} | {said} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of decoders' names; none: all")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    every = recipe_decoders()
    keep_memory()
    for name, settings in every.items() if not args.table else ():
        if args.names and not name.startswith(tuple(args.names)):
            continue
        row = measure(settings)
        keep_row(RESULTS, name, row, every)
        print(name, json.dumps({key: row[key] for key in (*WAYS, "search_captions_per_s")}), flush=True)
    rows = read_rows(RESULTS)
    replace_table("docs/decoders.md", COSTS, build_costs(rows))
    replace_table("docs/training.md", COMPILED, build_compiled(rows))


if __name__ == "__main__":
    main()
