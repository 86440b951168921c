"""reports/index.html: one file with everything in it, to be mailed or opened from disk.

Captions come from models and from strangers: the template escapes every value (Jinja's autoescape); only what this
package draws itself (`Markup`) is put in as it is.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning.figures.overlays import TILE_PX, WordMap
from captioning.reporting import provenance
from captioning.reporting.health import Health
from captioning.reporting.inputs import Curve
from captioning.reporting.leaderboard import ALL, Row, Table
from captioning.reporting.statistics import Statistics, format_number

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Sample:
    """A test image with what people and captioners say of it."""

    image_id: str
    source: str
    thumbnail: str
    """A data URI."""
    references: list[str]
    captions: list[tuple[str, str, float | None]]
    """(captioner, caption, CIDEr of this image)."""


@dataclass(frozen=True)
class AttentionSample:
    """A test image with every trained captioner's word maps."""

    image_id: str
    source: str
    thumbnail: str
    rows: list[tuple[str, list[tuple[WordMap, str]]]]
    """(captioner, its words with their pictures as data URIs)."""


@dataclass(frozen=True)
class TrainingSummary:
    """A trained captioner's history in numbers."""

    captioner: str
    num_steps: int
    train_loss: float | None
    """Where it was logged last: before self-critical epochs. `val_loss` is that of the same epoch."""
    val_loss: float | None
    best_cider: float | None
    best_step: int | None


def summarize_training(captioner: str, curves: Mapping[str, Curve]) -> TrainingSummary:
    """The ends of the loss curves and the best validation CIDEr-D."""
    ciders, losses, val_losses = (curves.get(name, ()) for name in ("val/CIDEr", "train/loss", "val/loss"))
    step, best = max(ciders, key=lambda point: point[1]) if ciders else (None, None)
    last_step, train_loss = losses[-1] if losses else (0, None)
    # Of the epoch in which the training loss was logged last: its own validation is the first after that.
    val_loss = next((loss for at, loss in val_losses if at >= last_step), val_losses[-1][1] if val_losses else None)
    num_steps = int(max(point[0] for points in curves.values() for point in points))
    return TrainingSummary(captioner, num_steps, train_loss, val_loss, best, None if step is None else int(step))


@dataclass(frozen=True)
class Page:
    """All that index.html shows."""

    tables: Sequence[Table]
    captioners: Sequence[str]
    setting: Sequence[str]
    figures: dict[str, tuple[str, str]]
    """Name → (light, dark) data URIs."""
    training: Sequence[TrainingSummary]
    samples: Sequence[Sample]
    attention: Sequence[AttentionSample]
    statistics: Statistics
    params: str
    """The resolved params as YAML."""
    outs: Sequence[provenance.StageOut]
    flow: str
    """An SVG."""
    run: provenance.Run
    health: Health


def data_uri(data: bytes, kind: str) -> str:
    """Bytes of an image as a `data:` URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture_uri(pixels: NDArray[np.uint8], quality: int = 80) -> str:
    """HWC uint8 RGB as a JPEG data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return data_uri(buffer.getvalue(), "jpeg")


def render_page(page: Page) -> str:
    """The whole HTML file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "score": _score,
        "seconds": provenance.format_seconds,
        "bytes": provenance.format_bytes,
        "number": _number,
        "drawn": Markup,  # only for what this package draws itself
    }
    context: dict[str, Any] = {
        "page": page,
        "flow": Markup(page.flow),
        "run_begin": Markup(provenance.RUN_BEGIN),
        "run_end": Markup(provenance.RUN_END),
        "style": Markup((TEMPLATES / "report.css").read_text("utf-8")),
        "colours": {name: index % 7 for index, name in enumerate(page.captioners)},
        "all_sources": ALL,
        "interval_max": _interval_max(page.tables),
        "tile_px": TILE_PX,
    }
    return environment.get_template("report.html.j2").render(context)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _number(value: float, name: str = "") -> str:
    return format_number(name, value)


def _interval_max(tables: Sequence[Table]) -> float:
    """The right end of the leaderboard's interval bars."""
    rows: list[Row] = [row for table in tables for row in table.rows if row.interval]
    return max((row.interval.high for row in rows if row.interval), default=1.0) or 1.0
