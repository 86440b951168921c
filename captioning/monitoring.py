"""Health of a running stage: the machine's load and the stage's pace, sampled in the background, with alerts.

    with monitoring.watch("train@vgg-lstm", params.monitoring, paths.work_root() / "health"):
        with monitoring.waiting():           # for data; what is between two waits is computing
            batch = next(batches)
        monitoring.count(images=32, tokens=900)

Writes `<folder>/<stage>.jsonl` (a header a run, a line a sample) and `<folder>/alerts.jsonl`. Only plumbing: nothing
here can change, stop or fail a stage. Without a watch, `count`, `waiting` and `clear` do nothing. What a
process forked from the stage (a loader's worker) counts is not seen.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from captioning import alerts, health_records, probes, thresholds

if TYPE_CHECKING:
    from captioning.params import MonitoringParams

FIRST_SAMPLE_S = 1.0
JOIN_SECONDS = 0.2
NOTIFY_SECONDS = 5.0
Clock = Callable[[], float]


class Tally:
    """What the stage has done so far, and how long it waited for data. Safe to use from several threads."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._images = self._tokens = self._num_waiting = 0
        self._waited = self._since = 0.0
        self._first_wait: float | None = None

    def count(self, images: int, tokens: int) -> None:
        with self._lock:
            self._images += images
            self._tokens += tokens

    def begin_wait(self) -> None:
        with self._lock:
            now = self._clock()
            if self._first_wait is None:
                self._first_wait = now
            if not self._num_waiting:
                self._since = now
            self._num_waiting += 1

    def end_wait(self) -> None:
        with self._lock:
            self._num_waiting -= 1
            if not self._num_waiting:
                self._waited += self._clock() - self._since

    def totals(self) -> dict[str, float]:
        """Images and tokens; seconds waited and computed since the first wait, one that still lasts included."""
        with self._lock:
            now = self._clock()
            waited = self._waited + (now - self._since if self._num_waiting else 0.0)
            elapsed = 0.0 if self._first_wait is None else now - self._first_wait
            return {
                "images": self._images,
                "tokens": self._tokens,
                "wait_s": round(waited, 6),
                "compute_s": round(max(0.0, elapsed - waited), 6),
            }


class Health:
    """The watch over one run of one stage."""

    def __init__(self, stage: str, settings: MonitoringParams, folder: Path, clock: Clock = time.monotonic) -> None:
        self.tally = Tally(clock)
        self.run = f"{time.time_ns():x}-{os.getpid()}"
        self.alerts = alerts.Alerts(folder, stage, self.run, settings.notify_urls, self.complain)
        self._stage, self._settings, self._folder, self._clock = stage, settings, folder, clock
        self._path = health_records.samples_path(folder, stage)
        self._guards = [thresholds.Guard(limit) for limit in thresholds.build_limits(settings)]
        self._started = self._last_at = clock()
        self._last = self.tally.totals()
        self.latest: dict[str, Any] | None = None
        self._complaints: set[str] = set()
        self._wake = threading.Event()
        self._outcome: str | None = None
        self._thread = threading.Thread(target=self._work, name="health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, outcome: str) -> None:
        """Takes a last sample and ends; waits longer only for notifications that are on their way."""
        self._outcome = outcome
        self._wake.set()
        self._thread.join(JOIN_SECONDS)
        if self._thread.is_alive() and self.alerts.busy():
            self._thread.join(NOTIFY_SECONDS)

    def nudge(self) -> None:
        """Lets the background thread send an alert now instead of after the interval."""
        self._wake.set()

    def complain(self, what: str, error: Exception) -> None:
        """Says once that a part of the watch fails."""
        if what not in self._complaints:
            self._complaints.add(what)
            alerts.say(f"monitoring: {what}: {type(error).__name__}: {error}")

    def _work(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            machine = probes.Machine(self._folder, self.complain)
            header = {"kind": "run", "run": self.run, "stage": self._stage, "time": round(time.time(), 3)}
            health_records.append(self._path, {**header, "pid": os.getpid()}, fresh=True)
            self._sample_until_stopped(machine)
            end = {"kind": "end", "run": self.run, "time": round(time.time(), 3), "outcome": self._outcome}
            health_records.append(self._path, end)
        except Exception as error:
            self.complain("no samples", error)
        self.alerts.finish(NOTIFY_SECONDS)

    def _sample_until_stopped(self, machine: probes.Machine) -> None:
        interval = self._settings.interval_s
        due = self._clock() + min(FIRST_SAMPLE_S, interval)
        while True:
            self._wake.wait(max(0.0, due - self._clock()))
            self._wake.clear()
            stopping = self._outcome is not None
            if stopping or self._clock() >= due:
                self.sample(machine.read())
                due = self._clock() + interval
            self.alerts.deliver()
            if stopping:
                return

    def sample(self, reading: probes.Reading) -> dict[str, Any]:
        """Adds the stage's pace to a reading of the machine, writes it down, and compares it with the thresholds."""
        now, totals = self._clock(), self.tally.totals()
        pace = compute_pace(self._last, totals, now - self._last_at)
        self._last, self._last_at = totals, now
        elapsed = round(now - self._started, 3)
        record = {"kind": "sample", "run": self.run, "time": round(time.time(), 3), "elapsed_s": elapsed}
        record |= {**reading, **pace, "totals": totals}
        self.latest = record
        try:
            health_records.append(self._path, record)
            max_bytes = int(self._settings.max_file_mb * 1e6)
            health_records.bound(self._path, max_bytes, health_records.every_other_sample)
        except OSError as error:  # alerts go on where samples cannot be kept
            self.complain(str(self._path), error)
        self._compare(record, now)
        return record

    def _compare(self, record: dict[str, Any], now: float) -> None:
        computing = bool(record["totals"]["images"]) and probes.uses_gpu()
        for guard in self._guards:
            kind, limit = guard.limit.kind, guard.limit
            value = thresholds.measure(kind, record)
            if kind == "gpu_idle" and not computing:
                value = None
            news = guard.check(value, now)
            if news == "alert" and value is not None:
                self.alerts.alert(kind, limit.text.format(value=value), round(value, 3), limit.threshold)
            elif news == "clear":
                self.alerts.clear(kind)

    def accepts(self, kind: str) -> bool:
        return kind != "loss_not_finite" or self._settings.loss_not_finite


def compute_pace(before: dict[str, float], after: dict[str, float], seconds: float) -> dict[str, float | None]:
    """Images and tokens per second between two tallies, and the share of time waited; None where there is none."""
    done = {name: after[name] - before[name] for name in after}
    timed = done["wait_s"] + done["compute_s"]

    def rate(name: str) -> float | None:
        return round(done[name] / seconds, 3) if after[name] and seconds > 0 else None

    return {
        "images_per_s": rate("images"),
        "tokens_per_s": rate("tokens"),
        "loader_wait_share": round(done["wait_s"] / timed, 4) if timed > 0 else None,
    }


_active: Health | None = None


def _forget() -> None:
    global _active
    _active = None


# A forked loader's worker has no background thread, and perhaps a lock that nobody will ever release.
os.register_at_fork(after_in_child=_forget)


@contextmanager
def watch(stage: str, settings: MonitoringParams, folder: Path) -> Iterator[Health | None]:
    """Samples until the block ends. Gives None, with a word on stderr, where the watch itself cannot begin."""
    global _active
    before, health = _active, _begin(stage, settings, folder)
    _active = health
    outcome = "failed"
    try:
        yield health
        outcome = "done"
    except Exception:
        raise
    except BaseException:  # Ctrl-C, SIGTERM: the next run goes on from here
        outcome = "interrupted"
        raise
    finally:
        _active = before
        if health is not None:
            health.stop(outcome)


def _begin(stage: str, settings: MonitoringParams, folder: Path) -> Health | None:
    try:
        health = Health(stage, settings, folder)
        health.start()
    except Exception as error:
        alerts.say(f"monitoring: {type(error).__name__}: {error}")
        return None
    return health


def count(images: int = 0, tokens: int = 0) -> None:
    """Adds to what the stage has done."""
    health = _active  # another thread may end the watch between two looks
    if health is not None:
        health.tally.count(images, tokens)


def latest() -> dict[str, Any] | None:
    """The last sample; None without a watch, or before its first one."""
    health = _active
    return None if health is None else health.latest


class waiting:  # noqa: N801 - used as `with monitoring.waiting():`; a class costs half of what @contextmanager does
    """Marks time that the stage waits for data."""

    __slots__ = ("_tally",)

    def __enter__(self) -> None:
        health = _active
        self._tally = None if health is None else health.tally
        if self._tally is not None:
            self._tally.begin_wait()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._tally is not None:
            self._tally.end_wait()


def alert(kind: str, message: str) -> None:
    """Warns, keeps and notifies, once until `clear(kind)`. Without a watch it only warns, each time."""
    health = _active
    if health is None:
        alerts.say(f"WARNING: {message}")
    elif health.accepts(kind):
        health.alerts.alert(kind, message)
        health.nudge()


def clear(kind: str) -> None:
    """Ends an alert of this kind, so that the next one is heard again. Cheap where there is none."""
    health = _active
    if health is not None:
        health.alerts.clear(kind)
