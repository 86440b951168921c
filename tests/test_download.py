"""The download stage as a whole: real worker processes, a web server on loopback, crashes and resumption."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import loopback
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback import Server, encoded, jpeg, picture

from captioning import fetching, shard_builder, shard_workers
from captioning.errors import CapstanError, DamagedError
from captioning.params import DownloadParams, load_params
from captioning.shard_builder import Chunk, build_chunk, finished_rows, make_chunks
from captioning.shard_workers import build_chunks
from captioning.shards import LedgerRow, iterate_shard, read_ledger, scan_shard, verify_shards
from captioning.source_params import SourceSettings
from captioning.sources.table import Row
from stages.download import check_failures, download

REPOSITORY = Path(__file__).parent.parent
PARAMS = load_params(REPOSITORY / "params.yaml")


@pytest.fixture
def server():
    with loopback.serve() as server:
        yield server


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))


def settings_for_urls(table: Path, max_images: int | None = None) -> SourceSettings:
    changes = {
        "table": table,
        "split_column": "split",
        "id_column": "id",
        "max_images": max_images,
    }
    url_table = PARAMS.source_settings.url_table.model_copy(update=changes)
    return PARAMS.source_settings.model_copy(update={"url_table": url_table})


def quick(**changes: object) -> DownloadParams:
    values = {"timeout_s": 3, "num_processes": 1, "num_retries": 0, "samples_per_shard": 5, "image_px": 32}
    return PARAMS.download.model_copy(update=values | changes)


def write_table(path: Path, rows: list[tuple[str, str]]) -> Path:
    """(url, caption) rows; every third image is val, every third test."""
    splits = [("train", "val", "test")[n % 3] for n in range(len(rows))]
    columns = {"url": [r[0] for r in rows], "caption": [r[1] for r in rows]}
    pq.write_table(pa.table(columns | {"split": splits, "id": [f"{n}" for n in range(len(rows))]}), path)
    return path


def run(table: Path, target: Path, **changes: object) -> None:
    download(sources=["url_table"], source_settings=settings_for_urls(table), download=quick(**changes), target=target)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_good_and_bad_addresses(server: Server, tmp_path, capsys):
    good = [server.add(f"/{n}.jpg", loopback.body(jpeg(n, 60, 40))) for n in range(6)]
    turned, whole = encoded(picture(40, 60, 9)), jpeg(1, 200, 200)
    bad = {
        server.url("/none"): ("permanent", "HTTP 404"),
        server.add("/html.jpg", loopback.body(b"<html>gone</html>")): ("permanent", "not an image"),
        server.add("/half.jpg", loopback.body(whole[: len(whole) * 2 // 3])): ("permanent", "truncated image"),
        server.add("/1x1.png", loopback.body(encoded(picture(1, 1), "PNG"))): ("permanent", "too small"),
        server.add("/500", loopback.status(500)): ("transient", "HTTP 500"),
        server.add("/bomb", loopback.body(encoded(picture(600, 600)))): ("permanent", "too many pixels"),
    }
    rows = [(url, f"a dog {n}") for n, url in enumerate([*good, *bad])]
    rows += [(server.add("/cmyk.jpg", loopback.body(encoded(picture().convert("CMYK")))), "a cmyk")]
    rows += [(server.add("/tall.jpg", loopback.body(turned)), "a tall"), (server.url("/untitled"), "  ")]
    table = write_table(tmp_path / "t.parquet", rows)
    run(table, tmp_path / "data" / "shards", max_failure_rate=0.6, max_image_pixels=200_000)

    ledger = read_ledger(tmp_path / "data" / "shards" / "ledger.parquet")
    assert [row.url for row in ledger] == [url for url, _ in rows]
    outcomes = {row.url: (row.status, row.reason) for row in ledger}
    assert {url: outcomes[url] for url in bad} == bad
    assert outcomes[server.url("/untitled")] == ("permanent", "no caption") and "/untitled" not in server.counts
    assert all(outcomes[url] == ("success", "") for url in good)
    assert [(row.width, row.height) for row in ledger if row.url.endswith(("tall.jpg", "/0.jpg"))] == [
        (48, 32),
        (32, 48),
    ]
    stored = [row for row in ledger if row.status == "success"]
    for shard in sorted({row.shard for row in stored}):
        path = tmp_path / "data" / "shards" / f"{shard}.tar"
        scan_shard(path, [row for row in stored if row.shard == shard])
        records = [(key, record["image_id"]) for key, _, record in iterate_shard(path)]
        assert records == [(row.key, row.image_id) for row in stored if row.shard == shard]
    assert len({row.key for row in stored}) == len(stored) == 8
    printed = capsys.readouterr().out
    assert "url_table: 8 of 15 images stored" in printed and "1 failed: HTTP 404 (permanent)" in printed
    assert sorted(p.name for p in (tmp_path / "data" / "shards").iterdir()) == names_of(ledger), "nothing else"


def names_of(ledger: list[LedgerRow]) -> list[str]:
    return [*sorted({f"{row.shard}.tar" for row in ledger if row.shard}), "ledger.parquet"]


def test_two_runs_give_the_same_bytes(server: Server, tmp_path):
    """img2dataset's own order changes with the network's: here the answers come in opposite orders."""

    def late(data: bytes, seconds: float) -> loopback.Answer:
        def answer(handler: loopback.Handler) -> None:
            time.sleep(seconds)
            loopback.body(data)(handler)

        return answer

    def fill(reverse: bool) -> list[str]:
        return [server.add(f"/{n}.jpg", late(jpeg(n), 0.05 * (9 - n if reverse else n))) for n in range(9)]

    table = write_table(tmp_path / "t.parquet", [(url, "a dog") for url in fill(False)])
    run(table, tmp_path / "one", samples_per_shard=9)
    shutil.rmtree(tmp_path / ".work")
    fill(True)
    run(table, tmp_path / "two", samples_per_shard=9)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    assert sorted(snapshot(tmp_path / "one")) == ["00000.tar", "ledger.parquet"]


def test_too_many_failures_publish_nothing_and_are_tried_again(server: Server, tmp_path, capsys):
    urls = [server.add(f"/{n}.jpg", loopback.body(jpeg(n))) for n in range(9)]
    server.answers["/7.jpg"] = loopback.status(503)
    table = write_table(tmp_path / "t.parquet", [(url, "a dog") for url in urls])
    target = tmp_path / "shards"
    with pytest.raises(CapstanError, match=r"1 of 9 images failed \(11.1%\).*max_failure_rate") as caught:
        run(table, target)
    assert not target.exists()
    ledger = Path(str(caught.value).partition("reason: ")[2].partition(". Mend")[0])
    assert [row.reason for row in read_ledger(ledger)].count("HTTP 503") == 1
    server.answers["/7.jpg"] = loopback.body(jpeg(7))
    run(table, target)
    assert "resumed: 1 of 2 shards verified, 1 left" in capsys.readouterr().out
    assert server.counts["/0.jpg"] == 1 and server.counts["/7.jpg"] == 2
    assert all(row.status == "success" for row in read_ledger(target / "ledger.parquet"))


def test_a_split_without_any_image_left_is_an_error(tmp_path):
    def outcome(split: str, status: str):
        row = Row(f"s/{split}", "s", split, "u", "u", ("a",))
        return shard_builder._ledger_row(row, status, "")

    rows = [outcome("train", "success"), outcome("val", "success"), outcome("test", "permanent")]
    with pytest.raises(CapstanError, match="every image of the test split failed"):
        check_failures(rows, 1.0, tmp_path / "ledger.parquet")


def local_chunks(folder: Path, num: int = 10, samples_per_shard: int = 5) -> list[Chunk]:
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for n in range(num):
        (images / f"{n}.jpg").write_bytes(jpeg(n))
        rows.append(Row(f"s/{n}", "s", "train", f"{n}.jpg", (images / f"{n}.jpg").as_uri(), ("a",)))
    return make_chunks(rows, samples_per_shard, folder / "work")


def test_finished_chunks_are_kept_and_damaged_ones_made_anew(tmp_path, capsys):
    chunks = local_chunks(tmp_path, 20)
    for chunk in chunks:
        build_chunk(chunk, quick(), lambda _: None)
    assert all(finished_rows(chunk) for chunk in chunks)
    before = snapshot(tmp_path / "work" / "shards")
    os.truncate(chunks[0].tar, 3000)
    data = bytearray(chunks[1].tar.read_bytes())
    data[700] ^= 4
    chunks[1].tar.write_bytes(data)
    os.truncate(chunks[2].part, 50)
    assert [finished_rows(chunk) is None for chunk in chunks] == [True, True, True, False]
    assert capsys.readouterr().out.count("set aside") == 3
    for chunk in chunks[:3]:
        build_chunk(chunk, quick(), lambda _: None)
    assert snapshot(tmp_path / "work" / "shards") == before


def test_a_changed_table_does_not_find_old_work(tmp_path):
    chunk = local_chunks(tmp_path, 5)[0]
    build_chunk(chunk, quick(), lambda _: None)
    other = Chunk(chunk.shard, chunk.first, chunk.rows[::-1], chunk.key_width, chunk.folder)
    assert finished_rows(other) is None


def test_a_chunk_without_any_image_has_no_tar(tmp_path):
    rows = [Row("s/1", "s", "train", "u", (tmp_path / "absent.jpg").as_uri(), ("a",))]
    chunk = make_chunks(rows, 5, tmp_path / "work")[0]
    build_chunk(chunk, quick(), lambda _: None)
    assert not chunk.tar.exists()
    assert [row.reason for row in finished_rows(chunk) or []] == ["no such file"]


@pytest.mark.parametrize(("num", "samples", "shards", "last_key"), [(10, 4, 3, "00000009"), (1, 5, 1, "00000000")])
def test_chunks_and_keys(num, samples, shards, last_key, tmp_path):
    chunks = make_chunks([Row(f"s/{n}", "s", "train", "u", "u", ()) for n in range(num)], samples, tmp_path)
    assert [chunk.shard for chunk in chunks] == [f"{n:05d}" for n in range(shards)]
    assert sum(len(chunk.rows) for chunk in chunks) == num
    assert chunks[-1].key(len(chunks[-1].rows) - 1) == last_key


def hang(pipe, params, log):
    pipe.recv()
    time.sleep(60)


def die(pipe, params, log):
    pipe.recv()
    os._exit(9)


def die_once(pipe, params, log):
    pipe.recv()
    if not Path(f"{log}.died").exists():
        Path(f"{log}.died").touch()
        os._exit(9)
    pipe.send(5)
    pipe.send("done")


@pytest.mark.parametrize(
    ("worker", "stall_s", "message"), [(hang, 1, "no sign of life for 1 s"), (die, 60, "worker died .exit code 9")]
)
def test_a_worker_that_hangs_or_dies_is_replaced_once(worker, stall_s, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shard_workers, "work", worker)
    with pytest.raises(CapstanError, match=f"shard 00000 failed 2 times: .*{message}"):
        build_chunks(local_chunks(tmp_path, 5), quick(), tmp_path, stall_s=stall_s)
    assert "once more" in capsys.readouterr().out


def test_a_worker_that_dies_once_does_no_harm(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shard_workers, "work", die_once)
    build_chunks(local_chunks(tmp_path, 5), quick(), tmp_path)
    assert "5/5 (100 %)" in capsys.readouterr().out


def test_a_killed_stage_is_resumed_with_the_same_result(tmp_path):
    """SIGKILL as soon as the first shard is committed."""
    small = {"num_images": 12, "image_px": 64}
    source = PARAMS.source_settings.shapes.model_copy(update=small)
    settings = PARAMS.source_settings.model_copy(update={"shapes": source})
    params = quick(samples_per_shard=2)
    program = (
        "import sys; from pathlib import Path; from stages.download import download;"
        "from captioning.params import DownloadParams; from captioning.source_params import SourceSettings;"
        "download(sources=['shapes'], source_settings=SourceSettings.model_validate_json(sys.argv[1]),"
        "download=DownloadParams.model_validate_json(sys.argv[2]), target=Path('killed'))"
    )
    command = [sys.executable, "-c", program, settings.model_dump_json(), params.model_dump_json()]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(".work/download/*/parts/*.parquet")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    published = (tmp_path / "killed").exists()
    done = len(list(tmp_path.glob(".work/download/*/parts/*.parquet")))
    resumed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    if done and not published:
        assert "shards verified" in resumed.stdout
    shutil.rmtree(tmp_path / ".work")
    download(sources=["shapes"], source_settings=settings, download=params, target=Path("whole"))
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")


def test_retry_rounds_are_bounded_and_slow_down(monkeypatch, tmp_path):
    pauses: list[float] = []
    monkeypatch.setattr(fetching, "_pause", lambda seconds, _: pauses.append(seconds))
    failed = fetching.Fetched(None, 0, 0, "transient", "timeout")
    monkeypatch.setattr(fetching, "fetch_round", lambda urls, *_: [failed] * len(urls))
    found = fetching.fetch(["u"], tmp_path, timeout_s=1, num_threads=1, num_retries=7, max_bytes=1)
    assert found == [failed]
    assert pauses == [2, 4, 8, 16, 32, 60, 60]


def test_a_run_that_was_killed_after_publishing_only_publishes_again(server: Server, tmp_path, capsys):
    urls = [server.add(f"/{n}.jpg", loopback.body(jpeg(n))) for n in range(9)]
    table = write_table(tmp_path / "t.parquet", [(url, "a dog") for url in urls])
    run(table, tmp_path / "shards")
    before = snapshot(tmp_path / "shards")
    shutil.rmtree(tmp_path / "shards")  # as DVC does before it runs a stage again
    for stray in ("00009.tar", ".00000.tar.tmp", "00000.tar.corrupt"):
        (next((tmp_path / ".work" / "download").glob("*/shards")) / stray).write_bytes(b"stray")
    run(table, tmp_path / "shards")
    assert "resumed: 2 of 2 shards verified, 0 left" in capsys.readouterr().out
    assert snapshot(tmp_path / "shards") == before
    assert set(server.counts.values()) == {1}, "nothing was fetched again"


def test_other_settings_have_work_of_their_own(server: Server, tmp_path):
    urls = [server.add(f"/{n}.jpg", loopback.body(jpeg(n))) for n in range(3)]
    table = write_table(tmp_path / "t.parquet", [(url, "a dog") for url in urls])
    for image_px in (32, 40, 32):
        run(table, tmp_path / "shards", image_px=image_px)
    assert len(list((tmp_path / ".work" / "download").glob("*/work.json"))) == 2
    assert set(server.counts.values()) == {2}


def test_published_shards_are_verified_by_their_ledger(server: Server, tmp_path):
    urls = [server.add(f"/{n}.jpg", loopback.body(jpeg(n))) for n in range(9)]
    run(write_table(tmp_path / "t.parquet", [(url, "a dog") for url in urls]), tmp_path / "shards")
    verify_shards(tmp_path / "shards", ["00000", "00001"])
    tar = tmp_path / "shards" / "00001.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    verify_shards(tmp_path / "shards", ["00000"])
    with pytest.raises(DamagedError, match=r"00001.tar has other bytes .*00001.tar.corrupt.*`dvc repro` again"):
        verify_shards(tmp_path / "shards", ["00000", "00001"])
    assert not tar.exists()


def wait_for_ever(chunk, download, heartbeat):
    Path("worker.pid").write_text(str(os.getpid()))
    time.sleep(600)


def test_workers_end_with_their_parent(tmp_path):
    """SIGKILL of the stage while a worker is busy and would not look at its pipe."""
    program = (
        "import sys; from pathlib import Path; from captioning import shard_workers;"
        "from captioning.params import DownloadParams; from captioning.shard_builder import make_chunks;"
        "from captioning.sources.table import Row; import test_download as t;"
        "chunks = make_chunks([Row('s/1', 's', 'train', 'u', 'u', ())], 1, Path('work'));"
        "shard_workers.work = t.work_for_ever;"
        "shard_workers.build_chunks(chunks, DownloadParams.model_validate_json(sys.argv[1]), Path())"
    )
    path = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"
    command = [sys.executable, "-c", program, quick().model_dump_json()]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    pid_file = tmp_path / "worker.pid"
    while process.poll() is None and not (pid_file.exists() and pid_file.read_text()):
        time.sleep(0.01)
    worker = psutil.Process(int(pid_file.read_text()))
    process.kill()
    process.wait()
    worker.wait(timeout=10)  # raises where it goes on


real_work = shard_workers.work


def work_for_ever(pipe, download, log):
    shard_workers.build_chunk = wait_for_ever
    real_work(pipe, download, log)
