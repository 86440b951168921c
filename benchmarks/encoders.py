"""All encoders beside their bare forward passes, for the table of docs/encoders.md: O(15 min) on 2 cores.

python -m benchmarks.encoders                        all
python -m benchmarks.encoders resnet50 vgg16         some; the others stay as they were measured
python -m benchmarks.encoders --missing --seconds 150    those without numbers yet, as many as begin in that time
python -m benchmarks.encoders --table                writes the table alone

Writes benchmarks/encoders.json, after each encoder.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import in_turn, keep_row, read_rows
from benchmarks.pages import replace_table
from captioning.encoders import ENCODERS, Encoder, build_encoder, fuse_encoder
from captioning.encoders.lite import IMAGE_PX
from captioning.precision import choose_precision, keep_memory

RESULTS = Path(__file__).with_suffix(".json")
BEGIN = "<!-- from benchmarks/encoders.json: `python -m benchmarks.encoders --table` -->"

BATCH_SIZE = 8
"""As feature extraction has it on a CPU."""
SLOW_S = 1.0
"""Networks that take longer for one image are measured one image at a time, once after a warm-up."""

Encode = Callable[[Tensor], Tensor]


@torch.inference_mode()
def measure_encoder(name: str, weights: str) -> dict[str, Any]:
    """One encoder's description, and images per second: of its bare network, of the encoder, and as `auto` has it."""
    encoder = build_encoder(name, weights)
    image_px = encoder.transform.image_px
    pixels = torch.randint(0, 256, (BATCH_SIZE, image_px, image_px, 3), dtype=torch.uint8)
    images = encoder.transform.normalise(pixels)
    started = time.perf_counter()
    encoder.backbone(images[:1])
    batch_size, repeats = (1, 1) if time.perf_counter() - started > SLOW_S else (BATCH_SIZE, 3)
    pixels, images = pixels[:batch_size], images[:batch_size].contiguous(memory_format=torch.channels_last)
    dtype = choose_precision("auto", torch.device("cpu"))
    plain, fused = _as_extracted(encoder, batch_size, torch.float32)
    fast, _ = _as_extracted(encoder, batch_size, dtype)
    works = {"bare": lambda: encoder.backbone(images), "fp32": lambda: plain(pixels), "auto": lambda: fast(pixels)}
    times = in_turn(works, repeats)
    return {
        **encoder.describe(),
        "weights": weights,
        "num_parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "stages": list(encoder.stages),
        "transform_digest": encoder.transform.digest,
        "fused": fused,
        "batch_size": batch_size,
        "repeats": repeats,
        "auto": str(dtype).removeprefix("torch."),
        "images_per_s": {work: batch_size / found["median_s"] for work, found in times.items()},
    }


def _as_extracted(encoder: Encoder, batch_size: int, dtype: torch.dtype) -> tuple[Encode, bool]:
    """As feature extraction runs it on a CPU, and whether that is fused."""
    try:
        return fuse_encoder(encoder, batch_size, dtype), True
    except ValueError:
        return lambda pixels: _autocast(encoder, pixels, dtype), False


def _autocast(encoder: Encoder, pixels: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return encoder(pixels)


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def build_table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown, an encoder a line."""
    lines = [
        "| encoder | px | resize | grid | dim | parameters | weights | bare, img/s | fp32 | auto | preprocessing |",
        "|:--|--:|:--|--:|--:|--:|:--|--:|--:|--:|:--|",
    ]
    for name, row in rows.items():
        transform, speed = row["transform"], row["images_per_s"]
        ratio = speed["fp32"] / speed["bare"]
        cells = [
            f"`{name}`", transform["image_px"], transform["interpolation"], "×".join(map(str, row["grid"])),
            row["encoder_dim"], f"{row['num_parameters'] / 1e6:.1f} M", row["weights"], _short(speed["bare"]),
            f"{_short(speed['fp32'])} ({ratio:.2f})", _short(speed["auto"]), f"`{row['transform_digest'][:12]}`",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _measure_all(names: list[str], seconds: float, hub: bool) -> None:
    started = time.monotonic()
    for name in names:
        if time.monotonic() - started > seconds:
            print(f"stopped before {name}: {seconds:g} s are over; --missing goes on")
            return
        weights = "package" if name in IMAGE_PX else "hub" if hub else "random"
        row = measure_encoder(name, weights)
        keep_row(RESULTS, name, row, ENCODERS)
        speed = row["images_per_s"]
        print(f"{name:20}", *(f"{work} {found:7.2f}" for work, found in speed.items()), "images/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of encoders; none: all")
    parser.add_argument("--missing", action="store_true", help="only those without numbers")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin none after that many")
    parser.add_argument("--hub", action="store_true", help="fetch torchvision's weights instead of random ones")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in ENCODERS]:
        parser.error(f"unknown: {' '.join(unknown)}. Choices: {' '.join(ENCODERS)}")
    known = read_rows(RESULTS)
    if not args.table:
        keep_memory()
        wanted = [n for n in args.names or ENCODERS if not (args.missing and n in known)]
        _measure_all(wanted, args.seconds, args.hub)
    replace_table("docs/encoders.md", BEGIN, build_table(read_rows(RESULTS)))


if __name__ == "__main__":
    main()
