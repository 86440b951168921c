"""When a threshold counts as passed, and how an alert is said, kept and sent."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from watched import DEFAULTS, DISK_FULL, FAST, SLICE, THRESHOLDS, WHOLE, Clock, samples, wait_until

from captioning import health_records, monitoring, probes, thresholds
from captioning.alerts import Alerts
from captioning.params import MonitoringParams

ROOT = Path(__file__).parents[1]


# Thresholds


def limit_of(kind: str, settings: MonitoringParams = DEFAULTS) -> thresholds.Limit:
    return next(limit for limit in thresholds.build_limits(settings) if limit.kind == kind)


@given(
    st.lists(st.tuples(st.none() | st.floats(0, 200), st.integers(0, 100)), max_size=60),
    st.booleans(),
    st.sampled_from([0.0, 50.0]),
)
def test_two_alerts_always_have_a_clear_between_them(
    values: list[tuple[float | None, int]], is_minimum: bool, sustained_s: float
) -> None:
    limit = thresholds.Limit("kind", 90, is_minimum, sustained_s, "")
    guard, now, alerted, broken_for = thresholds.Guard(limit), 0, False, -1
    for value, seconds in values:
        now += seconds
        broken = value is not None and (value < 90 if is_minimum else value > 90)
        safe = value is not None and (value >= 90 * 1.1 if is_minimum else value <= 90 * 0.9)
        broken_for = (broken_for + seconds if broken_for >= 0 else 0) if broken else -1
        news = guard.check(value, now)
        assert (news == "alert") == (not alerted and broken and broken_for >= sustained_s)
        assert (news == "clear") == (alerted and safe)
        alerted = news == "alert" or (alerted and news != "clear")


def test_a_value_that_wavers_at_the_threshold_warns_once() -> None:
    guard = thresholds.Guard(limit_of("disk_low"))  # 2 GB
    news = [guard.check(value, 0) for value in (3, 1.9, 2.1, 1.9, 2.15, 1.9, 2.2, 1.9)]
    assert [item for item in news if item] == ["alert", "clear", "alert"] and news[1] == "alert" and news[6] == "clear"


def test_a_short_lull_is_no_idle_gpu() -> None:
    guard = thresholds.Guard(limit_of("gpu_idle"))  # below 10 % for 120 s
    assert [guard.check(load, now) for now, load in [(0, 5), (119, 5), (120, 50), (121, 5), (200, 5)]] == [None] * 5
    assert guard.check(5, 241) == "alert"


READING = {"disk_free": 1.5e9, "ram_used": 97, "ram_total": 100, "gpu": [WHOLE, SLICE], "loader_wait_share": 0.75}


@pytest.mark.parametrize(
    "kind, value",
    [("disk_low", 1.5), ("ram_high", 97), ("gpu_memory_high", 99), ("gpu_idle", 37), ("gpu_hot", 61),
     ("loader_bound", 75)],
)  # fmt: skip
def test_each_threshold_has_its_value_and_its_words(kind: str, value: float) -> None:
    assert thresholds.measure(kind, READING) == pytest.approx(value)
    assert thresholds.measure(kind, {"loader_wait_share": None}) is None
    text = limit_of(kind).text.format(value=value)
    assert f"{limit_of(kind).threshold:g}" in text and "monitoring." in text and "{" not in text


def test_null_is_off() -> None:
    assert len(thresholds.build_limits(DEFAULTS)) == len(THRESHOLDS) == 6
    assert not thresholds.build_limits(FAST)


def test_an_idle_gpu_counts_only_once_the_stage_computes_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, on_gpu = Clock(), False
    monkeypatch.setattr(probes, "uses_gpu", lambda: on_gpu)
    health = monitoring.Health("train", DEFAULTS, tmp_path, clock)

    def pass_time() -> bool:
        for _ in range(3):
            clock.now += 100
            health.sample({"gpu": [{**WHOLE, "util": 1}]})
        return "gpu_idle" in (tmp_path / "alerts.jsonl").read_text() if (tmp_path / "alerts.jsonl").exists() else False

    assert not pass_time()
    on_gpu = True
    assert not pass_time()
    health.tally.count(32, 0)
    assert pass_time()


# Alerts


def kept(folder: Path) -> list[dict[str, Any]]:
    return health_records.read(folder / "alerts.jsonl")


def test_an_alert_is_said_once_until_it_is_cleared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with monitoring.watch("train@a-b", FAST, tmp_path):
        for _ in range(3):
            monitoring.alert("loss_not_finite", "the loss is nan at step 7")
        monitoring.clear("loss_not_finite")
        monitoring.clear("loss_not_finite")
        monitoring.alert("loss_not_finite", "the loss is inf at step 9")
    assert capfd.readouterr().err.splitlines() == [
        "WARNING: the loss is nan at step 7",
        "WARNING: the loss is inf at step 9",
    ]
    assert [(r["kind"], r["stage"], r.get("cleared", False)) for r in kept(tmp_path)] == [
        ("loss_not_finite", "train@a-b", cleared) for cleared in (False, True, False)
    ]


def test_alerts_about_the_loss_can_be_turned_off(tmp_path: Path) -> None:
    with monitoring.watch("train", FAST.model_copy(update={"loss_not_finite": False}), tmp_path):
        monitoring.alert("loss_not_finite", "nan")
        monitoring.alert("disk_full", "full")
    assert [record["kind"] for record in kept(tmp_path)] == ["disk_full"]


def test_a_breach_is_kept_with_value_and_threshold(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with monitoring.watch("train@a-b", DISK_FULL, tmp_path):
        wait_until(lambda: len(samples(tmp_path)) >= 3)
    (alert,) = kept(tmp_path)
    assert alert["kind"] == "disk_low" and alert["threshold"] == 1e9 and 0 < alert["value"] < 1e9
    assert capfd.readouterr().err == f"WARNING: {alert['message']}\n"
    assert "GB is below monitoring.min_disk_free_gb (1e+09): make room" in alert["message"]


class Hook(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.server.letters.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@contextmanager
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        server.letters = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}", server.letters  # type: ignore[attr-defined]
        server.shutdown()
        thread.join()


def test_a_webhook_gets_the_alert_while_the_stage_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = DEFAULTS.model_copy(update={"interval_s": 3600.0, "notify_urls": ["$CAPSTAN_TEST_HOOK"]})
    with webhook() as (address, letters):
        monkeypatch.setenv("CAPSTAN_TEST_HOOK", f"json://{address}/hook")
        with monitoring.watch("train@a-b", slow, tmp_path):
            monitoring.alert("disk_full", "no room for the next checkpoint")
            wait_until(lambda: letters)
    (letter,) = letters
    assert letter["title"] == "Capstan: train@a-b" and letter["message"] == "no room for the next checkpoint"
    assert letter["type"] == "warning"


def test_alerts_of_the_last_moment_are_sent_in_one_letter(tmp_path: Path) -> None:
    with webhook() as (address, letters):
        alerts = Alerts(tmp_path, "train", "run", [f"json://{address}/"], lambda what, error: pytest.fail(str(error)))
        alerts.alert("disk_full", "one")
        alerts.alert("loss_not_finite", "two")
        alerts.finish(30)
    assert [letter["message"] for letter in letters] == ["one\ntwo"] and not alerts.busy()


def test_an_address_that_fails_is_named_without_its_password(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    urls = ["json://user:secret@127.0.0.1:9/", "nonsense://secret", "$CAPSTAN_NOT_SET"]
    health = monitoring.Health("train", FAST.model_copy(update={"notify_urls": urls}), tmp_path)
    for kind in ("one", "two"):
        health.alerts.alert(kind, kind)
        health.alerts.finish(30)
    said = capfd.readouterr().err
    assert said.count("monitoring: notifications") == 1 and "secret" not in said
    assert all(f"notify_urls[{index}]" in said for index in range(3)) and "environment variable" in said


def test_an_address_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("captioning.alerts.sys.executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 600\n")
    (tmp_path / "python").chmod(0o755)
    alerts = Alerts(tmp_path, "train", "run", ["json://127.0.0.1:9/"], lambda what, error: said.append(str(error)))
    alerts.alert("disk_full", "full")
    alerts.deliver()
    sender = alerts._sender
    assert sender and sender.poll() is None
    alerts.finish(0.1)
    assert sender.poll() == -signal.SIGKILL and not alerts.busy() and said == ["no answer in time"]
