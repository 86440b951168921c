"""Health in the report: what is made of the records, and that no record, however damaged, stops the page."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning import health_records, monitoring
from captioning.figures.health import Series, draw_chart, thin_out
from captioning.reporting.health import MIN_CHART_SAMPLES, Health, last_runs, read_health, summarize

STAGES = ["features@lite", "train@lite-lstm", "score@lite-lstm", "blip"]
CAPTIONERS = ["lite-lstm", "blip"]


def sample(run: str, index: int, **values: Any) -> dict[str, Any]:
    totals = {"images": 40 * index, "tokens": 400 * index, "wait_s": index, "compute_s": 3 * index}
    return {
        "kind": "sample", "run": run, "time": 1.7e9 + index, "elapsed_s": 4.0 * index, "cpu_percent": 50, "rss": 1e9,
        "rss_peak": 2e9, "loader_wait_share": 0.25, "images_per_s": 10, "tokens_per_s": 100, "totals": totals, **values,
    }  # fmt: skip


def write_run(folder: Path, stage: str, run: str, num: int = 8, outcome: str | None = "done", **values: Any) -> None:
    path = health_records.samples_path(folder, stage)
    health_records.append(path, {"kind": "run", "run": run, "stage": stage})
    for index in range(1, num + 1):
        health_records.append(path, sample(run, index, **values))
    if outcome:
        health_records.append(path, {"kind": "end", "run": run, "outcome": outcome})


def test_figures_are_those_of_the_records(tmp_path: Path) -> None:
    gpu = [{"util": 30, "memory_used": 5e9, "memory_total": 1e10, "temperature": None, "power_w": 1},
           {"util": 80, "memory_used": 4e9, "memory_total": 1e10, "temperature": 71, "power_w": 1}]  # fmt: skip
    write_run(tmp_path, "train@lite-lstm", "a", gpu=gpu)
    write_run(tmp_path, "score@lite-lstm", "b", num=2, rss_peak=3e9)
    write_run(tmp_path, "train@gone", "c")
    health = read_health(STAGES, CAPTIONERS, tmp_path)
    assert [stage.stage for stage in health.stages] == ["train@lite-lstm", "score@lite-lstm"] and health.has_gpu
    train, score = health.stages
    assert (train.seconds, train.memory, train.cpu_percent) == (32, 2e9, 50)
    assert (train.gpu_memory, train.gpu_percent, train.temperature) == (5e9, 80, 71)
    assert (train.images_per_s, train.tokens_per_s, train.loader_percent) == (10, 100, 25)
    assert [chart.title for chart in train.charts] == ["CPU", "memory", "GPU", "GPU memory", "images/s", "data wait"]
    assert score.charts == [] and 2 < MIN_CHART_SAMPLES
    (row,) = health.captioners
    assert (row.stage, row.memory, row.seconds, row.images_per_s) == ("lite-lstm", 3e9, 40, 10)


def test_a_run_that_was_killed_is_shown_with_the_one_that_went_on(tmp_path: Path) -> None:
    for run, outcome in [("old", "done"), ("failed", "failed"), ("killed", None), ("stopped", "interrupted"),
                         ("last", "done")]:  # fmt: skip
        write_run(tmp_path, "blip", run, outcome=outcome)
    segments = last_runs(health_records.read(tmp_path / "blip.jsonl"))
    assert [segment[0]["run"] for segment in segments] == ["killed", "stopped", "last"]
    stage = summarize("blip", segments)
    assert stage.num_restarts == 2 and stage.seconds == 96 and stage.images_per_s == 10
    assert stage.charts[0].svg.count('class="break"') == 2


def test_alerts_of_the_shown_runs_alone_with_how_long_they_lasted(tmp_path: Path) -> None:
    write_run(tmp_path, "blip", "a")
    path = tmp_path / health_records.ALERTS
    for run, kind, at, cleared in [("z", "x", 0, False), ("a", "x", 10, False), ("a", "y", 20, False),
                                   ("z", "y", 21, True), ("a", "x", 75, True), ("a", "x", 80, False)]:  # fmt: skip
        record = {"run": run, "kind": kind, "time": at, "stage": "blip", "message": f"{kind} at {at}"}
        health_records.append(path, record | ({"cleared": True} if cleared else {}))
    alerts = read_health(STAGES, CAPTIONERS, tmp_path).alerts
    assert [(alert.message, alert.lasted) for alert in alerts] == [
        ("x at 10", "1 min 05 s"), ("y at 20", None), ("x at 80", None),
    ]  # fmt: skip


def test_no_record_is_no_health(tmp_path: Path) -> None:
    assert read_health(STAGES, CAPTIONERS, tmp_path / "absent") == Health([], [], [])
    health_records.append(health_records.samples_path(tmp_path, "blip"), {"kind": "run", "run": "a"})
    assert read_health(STAGES, CAPTIONERS, tmp_path) == Health([], [], [])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("sample") | st.just("a"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(sample("", 1))), inner),
    max_leaves=8,
)


@given(st.lists(st.tuples(st.sampled_from([*sample("", 1), "gpu", "cleared", "message", "outcome"]), JSON), max_size=9))
def test_whatever_stands_in_the_records_the_page_is_written(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("health")
    for index, (name, value) in enumerate(changes * 2, 1):
        for path in (health_records.samples_path(folder, "blip"), folder / health_records.ALERTS):
            health_records.append(path, sample("a", index) | {name: value})
    health = read_health(STAGES, CAPTIONERS, folder)
    str(health).encode()


def test_any_damage_to_the_bytes_is_survived(tmp_path: Path) -> None:
    write_run(tmp_path, "blip", "a", num=12)
    path, draw = tmp_path / "blip.jsonl", random.Random(4)
    whole = path.read_bytes()
    for _ in range(200):
        bytes_ = bytearray(whole[: draw.randrange(len(whole))])
        for _ in range(min(5, len(bytes_))):
            bytes_[draw.randrange(len(bytes_))] = draw.randrange(256)
        path.write_bytes(bytes_)
        read_health(STAGES, CAPTIONERS, tmp_path)


def test_what_monitoring_writes_is_what_the_report_reads(tmp_path: Path) -> None:
    from watched import FAST, samples, wait_until

    with monitoring.watch("blip", FAST, tmp_path):
        for step in range(MIN_CHART_SAMPLES):
            with monitoring.waiting():
                monitoring.count(images=4, tokens=9)
            wait_until(lambda step=step: len(samples(tmp_path, "blip")) > step)  # type: ignore[misc]
        monitoring.alert("disk_full", "no room")
    health = read_health(STAGES, CAPTIONERS, tmp_path)
    (stage,) = health.stages
    assert stage.images_per_s and stage.tokens_per_s and stage.memory and stage.loader_percent is not None
    assert {"CPU", "memory", "images/s", "data wait"} <= {chart.title for chart in stage.charts}
    assert [alert.message for alert in health.alerts] == ["no room"]


def test_thinning_keeps_the_peak() -> None:
    points = [(float(at), None if at % 7 == 0 else float(at % 50)) for at in range(5000)]
    points[3210] = (3210.0, 999.0)
    thin = thin_out(points, 5000)
    assert len(thin) <= 120 and (3210.0, 999.0) in thin and thin == sorted(thin)
    assert thin_out(points[:50], 50) == points[:50]


def test_a_gap_is_not_bridged_and_a_lone_point_is_seen() -> None:
    series = Series("<b>", [(0, 1.0), (10, 2.0), (20, None), (30, 4.0)], 4, 0, 'a "b"')
    svg = draw_chart(series, 40)
    assert svg.count('class="line"') == 2 and svg.count('class="area"') == 1
    assert "M0 48L60 32" in svg and "M180 0L180.5 0" in svg
    assert "&lt;b&gt;" in svg and "&quot;b&quot;" in svg and json.dumps(svg).isascii()
    assert "nan" not in draw_chart(Series("x", [(0, 0.0), (0, 0.0)], 0, 0, ""), 0)
