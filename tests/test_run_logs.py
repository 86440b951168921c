"""Weights & Biases and TensorBoard: what they show is what was logged, once, and nothing they do reaches the run."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import Stop, build, run, stop_at
from test_training_options import assert_same, keeper_in
from watched import wait_until

from captioning import monitoring, run_logs
from captioning.errors import CapstanError
from captioning.interruption import Interrupted
from captioning.logging_params import LoggingParams
from captioning.run_logs import looks, process, records, wandb_sink, writer
from captioning.run_logs.records import RECORDS, RecordFile, RunLog, read_records
from captioning.training_log import TrainingLog

ROOT = Path(__file__).parents[1]
RUN = dict(num_epochs=4, log_every_steps=1)
"""Of 3 steps an epoch, so 12 training entries and 4 of validation."""
ABOUT = {"captioner": "enc-dec", "fingerprint": "f" * 16, "params": {"train": {"seed": 1}}}
SECONDS = 60.0


@pytest.fixture(autouse=True)
def no_settings_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def settings(**changes: Any) -> LoggingParams:
    values = dict(
        wandb="disabled", wandb_project="test", tensorboard=False, histograms_every_epochs=2, num_sample_captions=3
    )
    return LoggingParams(**(values | changes))


BOTH = settings(wandb="offline", tensorboard=True)


def open_log(folder: Path, chosen: LoggingParams = BOTH) -> RunLog:
    log = run_logs.open_log(chosen, folder / "enc-dec", ABOUT["fingerprint"], ABOUT["params"])
    assert log is not None
    return log


def place(folder: Path) -> Path:
    return folder / "enc-dec" / ABOUT["fingerprint"]


# Reading back


def wandb_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of the one offline run there, in their order; what a test cannot foresee is left out."""
    from wandb.proto import wandb_internal_pb2 as proto

    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    rows = []
    for content in _wandb_records(path.read_bytes()):
        record = proto.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            items = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            rows.append({k: v for k, v in items.items() if not k.startswith(("machine/", "_time", "_runtime"))})
    return rows


def _wandb_records(content: bytes):
    """LevelDB's log format: blocks of 32 KB, records in pieces of a checksum, a length and a kind."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        piece, at = content[at + 7 : at + 7 + length], at + 7 + length
        parts = piece if kind in (1, 2) else parts + piece
        if kind in (1, 4):
            yield parts


def read_events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(list((folder / "tensorboard").iterdir())) == 1
    return EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "histograms": 0, "tensors": 0}).Reload()


def scalars(events: Any) -> list[tuple[int, str, float]]:
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("machine/")]
    return sorted((e.step, tag, e.value) for tag in tags for e in events.Scalars(tag))


def texts(events: Any, tag: str) -> list[tuple[int, str]]:
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(tag)]


# A run


def train(folder: Path, logs: RunLog | None, keeper: Any = None, **changes: Any) -> Any:
    task, journal = build(folder, **(RUN | changes))
    with TrainingLog(None, logs) as log:
        journal.log, journal.log_again = log, log.again
        log.watch(task)
        run(task, journal, keeper)
    return task, journal


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted run that logs nothing: (task, journal)."""
    return train(tmp_path_factory.mktemp("plain"), None)


def check_all_is_there(folder: Path, journal: Any) -> None:
    """Each entry of the journal once in both, with its samples."""
    entries = [json.loads(line) for line in journal.lines]
    wanted = sorted((e["step"], name, np.float32(v)) for e in entries for name, v in e["metrics"].items())
    events, rows = read_events(folder), wandb_rows(folder)
    assert scalars(events) == wanted
    assert [row["_step"] for row in rows] == list(range(16)) and [row["step"] for row in rows] == [
        e["step"] for e in entries
    ]
    for row, entry in zip(rows, entries, strict=True):
        assert {name: row[name] for name in entry["metrics"]} == entry["metrics"]
    ends = [row for row in rows if "val/loss" in row]
    assert [row["step"] for row in ends] == [3, 6, 9, 12]
    assert all(row["val/captions._type"] == "html-file" for row in ends)
    assert [step for step, _ in texts(events, "val/captions")] == [3, 6, 9, 12]
    names = [f"parameters/{name}" for name, _ in build(folder / "again", **RUN)[0].decoder.named_parameters()]
    assert events.Tags()["histograms"] == names
    assert all([e.step for e in events.Histograms(name)] == [6, 12] for name in names)
    shown = [sum(f"{name}.values" in row for name in names) for row in ends]
    assert shown == [0, len(names), 0, len(names)]


def test_all_of_a_run_is_shown_and_none_of_its_bits_change(tmp_path: Path, plain: Any) -> None:
    task, journal = train(tmp_path, open_log(tmp_path))
    assert_same(task.state_dict(), plain[0].state_dict())
    assert journal.lines == plain[1].lines
    check_all_is_there(place(tmp_path), journal)
    events = read_events(place(tmp_path))
    name = "parameters/output.weight"
    last, values = events.Histograms(name)[-1].histogram_value, task.decoder.output.weight.detach().numpy()
    assert last.num == values.size == sum(last.bucket) and last.min == values.min() and last.max == values.max()
    _, table = texts(events, "val/captions")[-1]
    for i in (0, 3, 7):  # three of eleven images
        (reference,) = task.val_cider.references[i]
        assert f"| {task.val.image_ids[i]} | {task.val_cider.captions[i]} | {reference} |" in table
    assert task.val_cider.captions[0].startswith("red")
    ((_, params),) = texts(events, "params")
    assert '"seed": 1' in params
    pages = list(place(tmp_path).glob("wandb/offline-run-*/files/media/html/val/*.html"))
    assert len(pages) == 4 and all("<td>red" in page.read_text() for page in pages[-1:])


@pytest.mark.parametrize(("stops", "kill"), [([3, 5, 9], True), ([6, 7], False)])
def test_a_resumed_run_shows_everything_once(tmp_path, monkeypatch, plain, stops, kill) -> None:
    """In validation and mid-epoch. What was logged after the last checkpoint is logged anew, not twice."""
    for stop in [*stops, None, None]:  # the last one finds all done
        task, journal = build(tmp_path, **RUN)
        stop_at(task, stop, kill, monkeypatch)
        log = TrainingLog(None, open_log(tmp_path))
        journal.log, journal.log_again = log, log.again
        log.watch(task)
        if stop is None:
            with log:
                run(task, journal, keeper_in(tmp_path))
        else:
            with pytest.raises(Stop if kill else Interrupted), log:
                run(task, journal, keeper_in(tmp_path))
    assert_same(task.state_dict(), plain[0].state_dict())
    assert journal.lines == plain[1].lines
    check_all_is_there(place(tmp_path), journal)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
from test_run_logs import open_log
log = open_log(Path({folder!r}))
for step in range(5):
    log.add(step, {{"train/loss": 1.0 / (step + 1)}})
print(log._writer._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_trainer_leaves_no_writer_and_its_records_are_kept(tmp_path: Path) -> None:
    """The next run begins at once; its writer waits for the one that is still finishing."""
    script = KILLED.format(tests=str(ROOT / "tests"), root=str(ROOT), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    log = open_log(tmp_path)
    for step in range(3):  # of a checkpoint
        log.again(step, {"train/loss": 1.0 / (step + 1)})
    log.add(3, {"train/loss": 9.0})
    log.close(SECONDS)
    wait_until(lambda: not Path(f"/proc/{done.stdout.strip()}").exists())
    assert [e for e in scalars(read_events(place(tmp_path)))] == [
        (step, "train/loss", np.float32(value)) for step, value in enumerate([1, 1 / 2, 1 / 3, 9])
    ]
    assert [row["train/loss"] for row in wandb_rows(place(tmp_path))] == [1, 1 / 2, 1 / 3, 9]


# Records


def test_samples_of_entries_before_the_checkpoint_are_taken_up_and_later_ones_dropped(tmp_path: Path) -> None:
    path = tmp_path / RECORDS
    old = [{"step": step, "metrics": {"a": math.nan}, "time": 1.0, "captions": [step]} for step in (1, 2, 3)]
    path.write_text("".join(records.to_line(line) for line in [ABOUT, *old]) + '{"step": 4, "metr')
    path.write_bytes(path.read_bytes().replace(b'"captions": [3]', b'"captions": [7]'))  # damaged
    log = RunLog(tmp_path, ABOUT, settings())
    log.again(1, {"a": math.nan})
    log.again(2, {"a": 7.0})  # of another run: nothing of it is believed
    log.again(3, {"a": math.nan})
    log._write()
    _, first, second, third = read_records(path)
    assert first["captions"] == [1] and first["time"] == 1.0
    assert "captions" not in second and second["metrics"] == {"a": 7.0}
    assert "captions" not in third and third["step"] == 3


def test_nothing_is_touched_before_the_checkpoint_is_known(tmp_path: Path) -> None:
    (tmp_path / RECORDS).write_text(records.to_line(ABOUT))
    log = RunLog(tmp_path, ABOUT, settings())
    log.again(1, {"a": 1.0})
    assert len(read_records(tmp_path / RECORDS)) == 1
    RunLog(tmp_path / "new", ABOUT, settings()).close(SECONDS)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_only_delays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real, left = RecordFile(tmp_path / RECORDS, "0\n"), os.write, [0]
    file.write()

    def write(descriptor: int, content: bytes) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, "full")
        return real(descriptor, content[: left[0]])

    monkeypatch.setattr(os, "write", write)
    for number, room in ((1, 0), (2, 3), (3, 100)):
        left[0] = room
        file.add(f"{number}\n")
        if room < 100:
            with pytest.raises(OSError):
                file.write()
            assert (tmp_path / RECORDS).read_text() == "0\n"
        else:
            file.write()
    assert (tmp_path / RECORDS).read_text() == "0\n1\n2\n3\n"


def test_a_folder_that_cannot_be_made_costs_an_alert_and_no_bit(tmp_path, plain, capsys) -> None:
    (tmp_path / "enc-dec").write_text("in the way")
    task, _ = train(tmp_path, open_log(tmp_path))
    assert_same(task.state_dict(), plain[0].state_dict())
    said = capsys.readouterr().err
    assert "cannot be written" in said and "training goes on" in said


def test_a_look_that_fails_costs_its_samples_alone(tmp_path: Path, capsys) -> None:
    log = open_log(tmp_path, settings(tensorboard=True))

    def fall(metrics: dict[str, float]) -> dict[str, Any]:
        raise RuntimeError("no such thing")

    log.look = fall
    log.add(1, {"a": 1.0})
    log.close(SECONDS)
    assert "samples and measurements are not logged (RuntimeError('no such thing'))" in capsys.readouterr().err
    assert scalars(read_events(place(tmp_path))) == [(1, "a", 1.0)]


# The process


def test_a_writer_that_dies_is_replaced_at_the_end(tmp_path: Path, capsys) -> None:
    log = open_log(tmp_path)
    for step in range(3):
        log.add(step, {"a": float(step)})
    pid = log._writer._process.pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: log._writer._process.poll() is not None)
    for step in range(3, 6):
        log.add(step, {"a": float(step)})
    assert capsys.readouterr().err.count("died; what it missed is written at the end") == 1
    log.close(SECONDS)
    assert [row["a"] for row in wandb_rows(place(tmp_path))] == [0, 1, 2, 3, 4, 5]
    assert [value for *_, value in scalars(read_events(place(tmp_path)))] == [0, 1, 2, 3, 4, 5]


def test_wandbs_service_may_die(tmp_path: Path, capsys) -> None:
    import psutil

    log = open_log(tmp_path)
    log.add(0, {"a": 0.0})
    wait_until(lambda: list(place(tmp_path).glob("wandb/offline-run-*/*.wandb")))
    (service,) = psutil.Process(log._writer._process.pid).children()
    service.kill()
    for step in range(1, 4):
        log.add(step, {"a": float(step)})
    log.close(SECONDS)
    assert "WARNING: logging.wandb: " in capsys.readouterr().err
    assert [row["a"] for row in wandb_rows(place(tmp_path))] == [0, 1, 2, 3]
    assert [value for *_, value in scalars(read_events(place(tmp_path)))] == [0, 1, 2, 3]


def test_a_writer_that_hangs_is_not_waited_for(tmp_path: Path, capsys) -> None:
    log = open_log(tmp_path, settings(tensorboard=True))
    log.add(0, {"a": 1.0})
    pid = log._writer._process.pid
    os.kill(pid, signal.SIGSTOP)
    for _ in range(70_000):  # more than a pipe holds
        log._nudge()
    log.add(1, {"a": 1.0})
    log.close(0.1)
    assert not Path(f"/proc/{pid}").exists()
    assert "was not handed on in 0.1 s to its end" in capsys.readouterr().err
    assert [r.get("step") for r in read_records(place(tmp_path) / RECORDS)] == [None, 0, 1]
    rerun = [sys.executable, "-m", "captioning.run_logs.writer", str(place(tmp_path))]  # as the docs say
    subprocess.run(rerun, cwd=ROOT, stdin=subprocess.DEVNULL, check=True)
    assert [step for step, *_ in scalars(read_events(place(tmp_path)))] == [0, 1]


def test_closing_may_be_interrupted_and_leaves_no_process(tmp_path: Path, monkeypatch) -> None:
    log = open_log(tmp_path, settings(tensorboard=True))
    log.add(0, {"a": 1.0})
    pid = log._writer._process.pid

    def interrupt(seconds: float) -> None:
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(process.time, "sleep", interrupt)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(Interrupted):
        log.close(SECONDS)
    assert not Path(f"/proc/{pid}").exists()


class Faulty:
    """A sink that fails where it is told to, once."""

    def __init__(self, faults: set[Any], seen: list[Any]) -> None:
        self.faults, self.seen = faults, seen
        seen.clear()
        self._fall("begin")

    def _fall(self, where: Any) -> None:
        if where in self.faults:
            self.faults.remove(where)
            raise RuntimeError(f"broken\nat {where}")

    def write(self, index: int, record: dict[str, Any]) -> None:
        self._fall(index)
        self.seen.append((index, record["step"]))

    def close(self) -> None:
        self._fall("close")
        self.seen.append("closed")


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        (set(), [None]),
        ({"begin"}, ["broken at begin"]),
        ({0, 2}, ["broken at 0"]),
        ({1}, ["broken at 1"]),
        ({"close"}, ["broken at close"]),
    ],
)
def test_a_sink_that_fails_disturbs_no_other(tmp_path: Path, monkeypatch, faults, told) -> None:
    seen: dict[str, list[Any]] = {"bad": [], "good": []}
    sinks = {"bad": lambda: Faulty(faults, seen["bad"]), "good": lambda: Faulty(set(), seen["good"])}
    monkeypatch.setattr(writer, "build_sink", lambda name, *rest: sinks[name]())
    lines = [{**ABOUT, "sinks": ["bad", "good"]}, *({"step": step, "metrics": {}} for step in (5, 6, 7))]
    texts = [records.to_line(line) for line in lines]
    (tmp_path / RECORDS).write_text("".join(texts[:2]) + texts[2][:4])  # the rest of a line is still to come
    said: list[dict[str, Any]] = []
    follower = writer.Follower(tmp_path, said.append)
    follower.follow()
    assert seen["good"] == [(0, 5)]
    with (tmp_path / RECORDS).open("a") as file:
        file.write(texts[2][4:] + texts[3])
    follower.follow()
    failed = follower.finish()
    wanted = [(0, 5), (1, 6), (2, 7), "closed"]
    assert seen["good"] == wanted and (seen["bad"] == wanted) is (told == [None])
    assert failed == ([] if told == [None] else ["bad"])
    assert {"sink": "good", "error": None} in said
    errors = [answer["error"] for answer in said if answer["sink"] == "bad"]
    assert errors == [told[0] and f"logging.bad: {told[0]}; training goes on without it"]


def test_what_a_sink_says_becomes_an_alert(tmp_path: Path, capsys, monkeypatch) -> None:
    """TensorBoard's folder cannot be made anew, also not at the end."""
    folder = place(tmp_path)
    log = open_log(tmp_path, settings(tensorboard=True))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    (tmp_path / "broken" / "tensorboard").mkdir(parents=True)
    (tmp_path / "broken" / "tensorboard" / "__init__.py").write_text("raise RuntimeError('no TensorBoard today')")
    log.add(0, {"a": 1.0})
    log.close(SECONDS)
    assert "WARNING: logging.tensorboard: no TensorBoard today; training goes on" in capsys.readouterr().err
    assert not (folder / "tensorboard").exists() and len(read_records(folder / RECORDS)) == 2


# Weights & Biases online


def test_without_a_server_an_online_run_is_kept_offline(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    log = open_log(tmp_path, settings(wandb="online"))
    for step in range(3):
        log.add(step, {"a": float(step)})
    log.close(SECONDS)
    said = capsys.readouterr().err
    assert "logging.wandb: " in said and f"`wandb sync {place(tmp_path) / 'wandb'}/offline-run-*` sends it" in said
    assert [row["a"] for row in wandb_rows(place(tmp_path))] == [0, 1, 2]


class Run:
    """Of wandb, on a server that has its first rows."""

    def __init__(self, step: int) -> None:
        self.step, self.rows = step, list[tuple[int, dict[str, Any]]]()

    def define_metric(self, *names: str, **options: str) -> None:
        pass

    def log(self, row: dict[str, Any], step: int) -> None:
        self.rows.append((step, row))


def test_a_resumed_online_run_sends_what_the_server_lacks(tmp_path: Path, monkeypatch) -> None:
    run, asked = Run(2), []
    monkeypatch.setattr(wandb_sink, "_start", lambda folder, about, mode: asked.append(mode) or run)
    sink = wandb_sink.WandbSink(tmp_path, {**ABOUT, "logging": settings(wandb="online").model_dump()}, print)
    for index in range(4):
        sink.write(index, {"step": 10 * index, "metrics": {"a": index}})
    assert asked == ["online"] and run.rows == [(2, {"a": 2, "step": 20}), (3, {"a": 3, "step": 30})]


def test_a_run_has_the_same_name_in_wandb_whenever_it_is_resumed(tmp_path: Path, monkeypatch) -> None:
    import wandb

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **options: asked.append(options) or Run(0))
    about = {**ABOUT, "captioner": "e" * 70, "logging": settings(wandb="online").model_dump()}
    for _ in range(2):
        wandb_sink.WandbSink(tmp_path, about, print)
    assert asked[0]["id"] == asked[1]["id"] and len(asked[0]["id"]) == 64
    assert asked[0]["id"].endswith("e-" + "f" * 16) and asked[0]["resume"] == "allow" and asked[0]["mode"] == "online"
    assert asked[0]["config"] == ABOUT["params"]


# What is looked at


def test_histograms_count_as_numpy_does() -> None:
    values = torch.randn(50, 40, generator=torch.Generator().manual_seed(3))
    found = looks.count(values)
    wanted, edges = np.histogram(values.numpy(), looks.NUM_BINS, (found["low"], found["high"]))
    assert found["counts"] == wanted.tolist() and sum(found["counts"]) == 2000
    assert found["sum"] == pytest.approx(values.double().sum().item(), rel=1e-4)
    assert found["sum_squares"] == pytest.approx(values.double().square().sum().item())
    assert found["low"] == values.min().item() and found["high"] == values.max().item()
    assert sum(looks.count(torch.full((7,), 2.0))["counts"]) == 7
    assert sum(looks.count(torch.tensor([1.0, math.nan, math.inf, 2.0]))["counts"]) == 2
    assert looks.count(torch.tensor([math.nan])) is None and looks.count(torch.empty(0)) is None


def test_only_what_learns_is_counted_and_no_random_number_is_drawn() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    model[0].requires_grad_(False)
    state = torch.get_rng_state()
    assert list(looks.count_parameters(model)) == ["1.weight", "1.bias"]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_machine_is_measured_once_a_sample(tmp_path: Path, monkeypatch) -> None:
    task, _ = build(tmp_path)
    look = looks.Looks(task, settings(num_sample_captions=0))
    gpu = {"util": 90, "memory_used": 5, "memory_total": 9, "temperature": 60, "power_w": None}
    sample = {"elapsed_s": 1.0, "images_per_s": 4.0, "loader_wait_share": None, "cpu_percent": 50.0, "gpu": [gpu, gpu]}
    monkeypatch.setattr(monitoring, "latest", lambda: sample)
    wanted = {f"gpu{n}_{name}": gpu[name] for n in (0, 1) for name in ("util", "memory_used", "temperature")}
    assert look({"train/loss": 1.0}) == {"machine": {"images_per_s": 4.0, "cpu_percent": 50.0, **wanted}}
    assert look({"train/loss": 1.0}) == {}
    sample["elapsed_s"] = 2.0
    assert "machine" in look({"train/loss": 1.0})
    monkeypatch.setattr(monitoring, "latest", lambda: None)
    assert look({"train/loss": 1.0}) == {}


def test_a_watched_run_logs_the_pace_of_its_loader(tmp_path: Path) -> None:
    from watched import FAST

    log = open_log(tmp_path, settings(tensorboard=True))
    log.look = looks.Looks(build(tmp_path)[0], settings())
    with monitoring.watch("train@a-b", FAST, tmp_path):
        with monitoring.waiting():
            monitoring.count(images=32, tokens=900)
        wait_until(lambda: monitoring.latest() is not None)
        log.add(1, {"train/loss": 1.0})
    log.close(SECONDS)
    tags = read_events(place(tmp_path)).Tags()["scalars"]
    assert {"machine/images_per_s", "machine/loader_wait_share", "machine/cpu_percent", "machine/rss"} <= set(tags)
    assert monitoring.latest() is None


# Params


def test_off_there_is_no_log(tmp_path: Path) -> None:
    assert run_logs.open_log(settings(), tmp_path, "name", {}) is None
    log = TrainingLog(None)
    log(1, {"a": 1.0})
    log.again(1, {"a": 1.0})
    log.mend([])


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_named_at_once(monkeypatch, name: str) -> None:
    chosen = settings(wandb="offline" if name == "wandb" else "disabled", tensorboard=name == "tensorboard")
    run_logs.check_installed(chosen)
    monkeypatch.setattr(run_logs, "find_spec", lambda name: None)
    with pytest.raises(CapstanError, match=rf"logging\.{name} asks for a package that is not installed: `pip install`"):
        run_logs.check_installed(chosen)
    run_logs.check_installed(settings())


@pytest.mark.parametrize("project", ["", "a/b", "a#b"])
def test_a_project_that_wandb_would_refuse_is_refused_here(project: str) -> None:
    with pytest.raises(ValueError):
        settings(wandb_project=project)


def test_no_stage_depends_on_logging() -> None:
    from ruamel.yaml import YAML

    stages = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].values()
    assert not any(name in str(stage) for stage in stages for name in ("'logging", "run_logs", "logging_params"))
