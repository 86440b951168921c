"""The report's section on health: what `captioning.monitoring` recorded of each stage's last run on this machine.

It belongs to one run, so all of it stands in the part of index.html that `provenance.without_run` cuts out. Records may
be absent, cut off or damaged: what cannot be read is not shown, and nothing here raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from captioning import health_records
from captioning.figures.health import Point, Series, draw_chart
from captioning.reporting.provenance import format_bytes, format_seconds

MIN_CHART_SAMPLES = 6
MAX_ALERTS = 30
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Chart:
    """A chart with the words above it."""

    title: str
    text: str
    svg: str


@dataclass(frozen=True)
class StageHealth:
    """One stage's last run, with the killed ones that it went on from."""

    stage: str
    num_restarts: int
    seconds: float
    memory: float | None
    """Peak bytes of all the stage's processes."""
    cpu_percent: float | None
    """Mean of the machine."""
    gpu_memory: float | None
    """Peak bytes on the fullest GPU."""
    gpu_percent: float | None
    temperature: float | None
    images_per_s: float | None
    tokens_per_s: float | None
    loader_percent: float | None
    charts: list[Chart] = field(default_factory=list)


@dataclass(frozen=True)
class Alert:
    """A warning of the run that is shown."""

    stage: str
    time: str
    message: str
    lasted: str | None
    """How long until it was cleared; None where it never was."""


@dataclass(frozen=True)
class Health:
    """All that the section shows."""

    stages: list[StageHealth]
    captioners: list[StageHealth]
    """Peaks over all stages of a captioner; its rates are those of training."""
    alerts: list[Alert]

    @property
    def has_gpu(self) -> bool:
        return any(stage.gpu_memory is not None or stage.gpu_percent is not None for stage in self.stages)


def read_health(stages: Sequence[str], captioners: Sequence[str], folder: Path) -> Health:
    """Reads the records of the named stages; others' are ignored."""
    found, runs = [], set()
    for stage in stages:
        segments = last_runs(health_records.read(health_records.samples_path(folder, stage)))
        if segments:
            found.append(summarize(stage, segments))
            runs |= {str(segment[0].get("run")) for segment in segments}
    alerts = read_alerts(health_records.read(folder / health_records.ALERTS), runs)
    return Health(found, [_combine(name, of) for name in captioners if (of := _stages_of(name, found))], alerts)


def last_runs(records: Records) -> list[Records]:
    """The samples of the last run, before them those of the runs that were killed or interrupted and that it resumes.

    A run without an end was killed; the last one may still be going on.
    """
    order = list(dict.fromkeys(str(r.get("run")) for r in records if r.get("kind") == "sample"))
    outcomes = {str(r.get("run")): r.get("outcome") for r in records if r.get("kind") == "end"}
    chosen: list[str] = []
    for run in reversed(order):
        if chosen and outcomes.get(run) not in (None, "interrupted"):
            break
        chosen.insert(0, run)
    return [[r for r in records if r.get("kind") == "sample" and str(r.get("run")) == run] for run in chosen]


def summarize(stage: str, segments: list[Records]) -> StageHealth:
    """Peaks, means and charts of one stage; its time is that while it ran."""
    samples, times, begins = [], [], []
    offset = 0.0
    for segment in segments:
        begins.append(offset)
        samples += segment
        times += [offset + (number(sample, "elapsed_s") or 0.0) for sample in segment]
        offset = max(times)
    totals = [_totals(segment) for segment in segments]

    def whole(name: str) -> float:
        return sum(total.get(name, 0.0) for total in totals)

    timed = whole("wait_s") + whole("compute_s")
    busy = timed or offset  # images go through while data is waited for and computed on, not during imports
    columns = {name: [read(sample) for sample in samples] for name, read in COLUMNS.items()}
    return StageHealth(
        stage, len(segments) - 1, offset, _peak(columns["memory peak"]), _mean(columns["CPU"]),
        _peak(columns["GPU memory"]), _mean(columns["GPU"]), _peak(columns["GPU temperature"]),
        whole("images") / busy if whole("images") and busy else None,
        whole("tokens") / busy if whole("tokens") and busy else None,
        100 * whole("wait_s") / timed if timed else None,
        _draw(columns, times, offset, begins[1:]) if len(samples) >= MIN_CHART_SAMPLES else [],
    )  # fmt: skip


def _totals(segment: Records) -> dict[str, float]:
    """The last running totals of one run."""
    last = segment[-1].get("totals")
    names = ("images", "tokens", "wait_s", "compute_s")
    return {name: number(last, name) or 0.0 for name in names} if isinstance(last, dict) else {}


def number(record: Any, name: str) -> float | None:
    """A value that is a number, and sane; the file may have been damaged by anything."""
    value = record.get(name) if isinstance(record, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e18:
        return None
    return float(value)


def _of_gpus(name: str) -> Callable[[dict[str, Any]], float | None]:
    def read(sample: dict[str, Any]) -> float | None:
        gpus = sample.get("gpu")
        values = [number(gpu, name) for gpu in gpus] if isinstance(gpus, list) else []
        return _peak(values)

    return read


def _share(sample: dict[str, Any]) -> float | None:
    value = number(sample, "loader_wait_share")
    return None if value is None else 100 * value


COLUMNS: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "CPU": lambda sample: number(sample, "cpu_percent"),
    "memory": lambda sample: number(sample, "rss"),
    "memory peak": lambda sample: number(sample, "rss_peak"),
    "GPU": _of_gpus("util"),
    "GPU memory": _of_gpus("memory_used"),
    "GPU temperature": _of_gpus("temperature"),
    "images/s": lambda sample: number(sample, "images_per_s"),
    "tokens/s": lambda sample: number(sample, "tokens_per_s"),
    "data wait": _share,
}
"""Name → its value in a sample."""


def _percent(value: float) -> str:
    return f"{value:.0f} %"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def _bytes(value: float) -> str:
    return format_bytes(int(value))


CHARTS: dict[str, tuple[int, float | None, Callable[[float], str]]] = {
    "CPU": (5, 100, _percent),
    "memory": (2, None, _bytes),
    "GPU": (1, 100, _percent),
    "GPU memory": (3, None, _bytes),
    "images/s": (0, None, _rate),
    "data wait": (4, 100, _percent),
}
"""Name → colour, top of the axis (None: the peak), and the value in words."""


def _draw(
    columns: dict[str, list[float | None]], times: list[float], duration: float, breaks: list[float]
) -> list[Chart]:
    charts = []
    for name, (colour, top, say) in CHARTS.items():
        peak, mean = _peak(columns[name]), _mean(columns[name])
        if peak is None or mean is None:
            continue
        text = f"peak {say(peak)}" if say is _bytes else f"mean {say(mean)}, peak {say(peak)}"
        points: list[Point] = list(zip(times, columns[name], strict=True))
        series = Series(name, points, top or 1.05 * peak, colour, f"{text}, over {format_seconds(duration)}")
        charts.append(Chart(name, text, draw_chart(series, duration, breaks)))
    return charts


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _peak(values: Sequence[float | None]) -> float | None:
    return max(_known(values), default=None)


def _mean(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return math.fsum(known) / len(known) if known else None


def _stages_of(captioner: str, stages: list[StageHealth]) -> list[StageHealth]:
    return [stage for stage in stages if stage.stage == captioner or stage.stage.split("@", 1)[-1] == captioner]


def _combine(captioner: str, stages: list[StageHealth]) -> StageHealth:
    """One row for a captioner: peaks over its stages, the pace of the first (training, or BLIP)."""
    first = stages[0]
    return StageHealth(
        captioner, sum(stage.num_restarts for stage in stages), sum(stage.seconds for stage in stages),
        _peak([stage.memory for stage in stages]), first.cpu_percent, _peak([stage.gpu_memory for stage in stages]),
        first.gpu_percent, _peak([stage.temperature for stage in stages]), first.images_per_s, first.tokens_per_s,
        first.loader_percent,
    )  # fmt: skip


def read_alerts(records: Records, runs: set[str]) -> list[Alert]:
    """The alerts of the runs that are shown, in order of time; the last ones where there are many."""
    alerts: list[Alert] = []
    opened: dict[tuple[str, str], tuple[int, float]] = {}
    for record in records:
        key = str(record.get("run")), str(record.get("kind"))
        at = number(record, "time") or 0.0
        if record.get("cleared"):
            index, since = opened.pop(key, (None, 0.0))
            if index is not None:
                old = alerts[index]
                alerts[index] = Alert(old.stage, old.time, old.message, format_seconds(max(0.0, at - since)))
        elif key[0] in runs:
            opened[key] = len(alerts), at
            alerts.append(Alert(_text(record, "stage"), _clock(at), _text(record, "message"), None))
    return alerts[-MAX_ALERTS:]


def _text(record: dict[str, Any], name: str) -> str:
    return str(record.get(name)).encode("utf-8", "replace").decode()  # half a surrogate cannot be written to a page


def _clock(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return ""
