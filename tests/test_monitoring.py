"""Health of a running stage: what is sampled, when it warns and whom it tells, and that it never gets in the way."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from watched import DISK_FULL, FAST, Clock, samples, wait_until

from captioning import health_records, monitoring, probes
from captioning.errors import CapstanError
from captioning.params import parse_params

ROOT = Path(__file__).parents[1]


# Sampling


def test_a_watched_stage_leaves_samples_of_the_machine_and_of_its_pace(tmp_path: Path) -> None:
    with monitoring.watch("train@a-b", FAST, tmp_path):
        with monitoring.waiting():
            pass
        monitoring.count(images=32, tokens=900)
        wait_until(lambda: len(samples(tmp_path)) >= 2)
        monitoring.count(images=8)
    first, *_, last = health_records.read(tmp_path / "train@a-b.jsonl")
    assert first["kind"] == "run" and first["stage"] == "train@a-b" and first["pid"] == os.getpid()
    assert last["kind"] == "end" and last["outcome"] == "done" and last["run"] == first["run"]
    sample = samples(tmp_path)[-1]
    assert sample["totals"]["images"] == 40 and sample["totals"]["tokens"] == 900 and sample["run"] == first["run"]
    assert 0 <= sample["cpu_percent"] <= 100 and 0 <= sample["loader_wait_share"] <= 1
    assert 1e6 < sample["rss"] <= sample["rss_peak"] < 1e12
    assert 0 < sample["ram_used"] < sample["ram_total"] and 0 < sample["disk_free"] < 1e18
    assert all(sample[name] >= 0 for name in ("disk_read_per_s", "net_sent_per_s") if name in sample)
    assert not (tmp_path / "alerts.jsonl").exists()
    assert not any(thread.name == "health" for thread in threading.enumerate())


def test_pace_is_exact_by_the_clock(tmp_path: Path) -> None:
    clock = Clock()
    health = monitoring.Health("train", FAST, tmp_path, clock)
    clock.now += 5  # before the first wait there is neither waiting nor computing
    for _ in range(4):
        health.tally.begin_wait()
        clock.now += 1
        health.tally.end_wait()
        clock.now += 3
        health.tally.count(10, 200)
    record = health.sample({})
    assert record["totals"] == {"images": 40, "tokens": 800, "wait_s": 4, "compute_s": 12}
    assert record["images_per_s"] == round(40 / 21, 3) and record["loader_wait_share"] == 0.25
    health.tally.begin_wait()  # and never ends: a loader that hangs is seen at once
    clock.now += 2
    record = health.sample({})
    assert record["loader_wait_share"] == 1 and record["images_per_s"] == 0 and record["totals"]["wait_s"] == 6


def test_waits_of_several_threads_are_counted_once() -> None:
    clock = Clock()
    tally = monitoring.Tally(clock)
    for step in (tally.begin_wait, tally.begin_wait, tally.end_wait, tally.end_wait):
        step()
        clock.now += 1
    assert tally.totals()["wait_s"] == 3 and tally.totals()["compute_s"] == 1


def test_counts_of_many_threads_add_up(tmp_path: Path) -> None:
    def work() -> None:
        for _ in range(2000):
            monitoring.count(images=1, tokens=2)

    with monitoring.watch("train", FAST, tmp_path) as health:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert health and health.tally.totals()["images"] == 8000 and health.tally.totals()["tokens"] == 16000


def test_without_a_watch_there_are_warnings_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    monitoring.count(images=1)
    with monitoring.waiting():
        monitoring.alert("disk_full", "no room")
        monitoring.clear("disk_full")
    assert capfd.readouterr() == ("", "WARNING: no room\n")


def test_a_stage_that_has_nothing_to_count_has_no_pace(tmp_path: Path) -> None:
    record = monitoring.Health("prepare", FAST, tmp_path).sample({})
    assert record["images_per_s"] is record["tokens_per_s"] is record["loader_wait_share"] is None


def test_a_forked_child_neither_counts_nor_hangs(tmp_path: Path) -> None:
    with monitoring.watch("train", FAST, tmp_path) as health:
        assert health
        with health.tally._lock:  # as if another thread held it at the fork
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                monitoring.count(images=1)
                with monitoring.waiting():
                    os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert health.tally.totals()["images"] == 0


@pytest.mark.parametrize("error, outcome", [(ValueError, "failed"), (KeyboardInterrupt, "interrupted")])
def test_the_stages_own_error_passes_and_is_noted(tmp_path: Path, error: type[BaseException], outcome: str) -> None:
    with pytest.raises(error), monitoring.watch("train", FAST, tmp_path):
        raise error
    assert health_records.read(tmp_path / "train.jsonl")[-1]["outcome"] == outcome


# Never in the way


def test_a_probe_that_fails_is_reported_once_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: 1 / 0)
    with monitoring.watch("train@a-b", FAST, tmp_path):
        wait_until(lambda: len(samples(tmp_path)) >= 3)
    assert all("ram_used" not in sample and "disk_free" in sample for sample in samples(tmp_path))
    assert capfd.readouterr().err == "monitoring: memory: ZeroDivisionError: division by zero\n"


def test_a_folder_that_cannot_be_written_does_not_stop_the_stage(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with monitoring.watch("train", FAST, tmp_path / "file" / "health"):
        monitoring.alert("disk_full", "no room for the next checkpoint")
    said = capfd.readouterr().err
    assert "WARNING: no room for the next checkpoint\n" in said and said.count("no samples") == 1


def test_a_broken_sampler_is_swallowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probes, "Machine", lambda *_: 1 / 0)
    with monitoring.watch("train", FAST, tmp_path):
        monitoring.count(images=1)
    monkeypatch.setattr(monitoring, "Health", lambda *_: 1 / 0)
    with monitoring.watch("train", FAST, tmp_path) as health:
        monitoring.count(images=1)
    assert health is None and capfd.readouterr().err.count("ZeroDivisionError") == 2


def test_watching_draws_no_random_number_and_loads_nothing_heavy_first(tmp_path: Path) -> None:
    code = (
        "import sys; from captioning import monitoring; "
        "sys.exit(bool({'psutil', 'pynvml', 'apprise', 'pydantic', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    random.seed(5)
    before = random.getstate()
    with monitoring.watch("train", DISK_FULL.model_copy(update={"notify_urls": ["json://127.0.0.1:9/"]}), tmp_path):
        wait_until(lambda: (tmp_path / "alerts.jsonl").exists())
    assert random.getstate() == before and "apprise" not in sys.modules


# Records


def test_lines_that_a_kill_cut_off_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    health_records.append(path, {"a": 1})
    with path.open("ab") as file:
        file.write(b'{"a": 2, "b": \xff\n[1]\n{"a": 3, "cut')
    health_records.append(path, {"a": 4}, fresh=True)
    assert health_records.read(path) == [{"a": 1}, {"a": 4}]
    assert health_records.read(tmp_path / "absent") == []


def test_a_file_stays_small_and_keeps_the_whole_time(tmp_path: Path) -> None:
    small, clock = FAST.model_copy(update={"max_file_mb": 0.02}), Clock()
    path = tmp_path / "train.jsonl"
    health_records.append(path, {"kind": "run", "run": "older"})
    health = monitoring.Health("train", small, tmp_path, clock)
    health_records.append(path, {"kind": "run", "run": health.run})
    for _ in range(1000):
        clock.now += 1
        health.sample({})
        assert path.stat().st_size < 21_000
    records = health_records.read(path)
    assert records[0] == {"kind": "run", "run": health.run}
    elapsed = [record["elapsed_s"] for record in records[1:]]
    assert elapsed == sorted(elapsed) and elapsed[0] == 1 and elapsed[-1] == 1000 and len(elapsed) > 30
    assert not list(tmp_path.glob("*.tmp"))


def test_several_processes_may_write_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from captioning.health_records import append\n"
        "for n in range(300): append(Path(sys.argv[1]), {'who': sys.argv[2], 'n': n, 'text': 'x' * 500})"
    )
    path = tmp_path / "alerts.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), who], cwd=ROOT) for who in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    records = health_records.read(path)
    assert sorted((r["who"], r["n"]) for r in records) == [(who, n) for who in "ab" for n in range(300)]


def test_addresses_are_checked_with_the_params() -> None:
    from ruamel.yaml import YAML

    tree = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    tree["monitoring"]["notify_urls"] = ["me@example.org"]
    with pytest.raises(CapstanError, match=r"monitoring.notify_urls.0: must be an apprise URL"):
        parse_params(tree)
