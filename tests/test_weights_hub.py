"""Weights from the hub: they arrive once and whole, whatever the server does and whoever is killed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import loopback
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import Answer, Handler, Server

from captioning import progress, transfer
from captioning.encoders import weights
from captioning.encoders.weights import hub_file
from captioning.errors import CapstanError

PARAM = "encoder_settings.resnet50.weights"
DATA = bytes(range(256)) * 8192  # 2 MiB


@pytest.fixture
def server():
    with loopback.serve() as running:
        yield running


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.0)
    return tmp_path / "hub" / "checkpoints"


def name_of(data: bytes, stem: str = "net") -> str:
    return f"{stem}-{hashlib.sha256(data).hexdigest()[:8]}.pth"


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def forbid(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    def called(*_: object, **__: object) -> None:
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(owner, name, called)


def test_weights_come_once_and_later_only_their_fast_digest_is_computed(server: Server, cache, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.0)
    name = name_of(DATA)
    url = server.add(f"/{name}", loopback.body(DATA))
    path = hub_file(url, PARAM)
    assert path == cache / name and path.read_bytes() == DATA
    assert names_in(cache) == {name, f"{name}.json", f"{name}.lock"}
    assert re.search(rf"{name}: \d+/{len(DATA)} \(\d+ %\) bytes, [\d.]+/s, \d+ s left", capsys.readouterr().out)
    forbid(monkeypatch, weights, "_digests")
    assert hub_file(url, PARAM) == path
    assert server.counts[f"/{name}"] == 1


def test_files_that_torch_put_there_are_checked_and_used(server: Server, cache, monkeypatch):
    name = name_of(DATA)
    cache.mkdir(parents=True)
    (cache / name).write_bytes(DATA)
    forbid(monkeypatch, transfer, "download")
    assert hub_file(server.url(f"/{name}"), PARAM) == cache / name
    assert names_in(cache) == {name, f"{name}.json"}  # and no lock: nothing had to be fetched


def test_a_read_only_cache_can_be_used(server: Server, cache, monkeypatch):
    name = name_of(DATA)
    cache.mkdir(parents=True)
    (cache / name).write_bytes(DATA)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(weights.storage, "write_json", refuse)
    assert hub_file(server.url(f"/{name}"), PARAM) == cache / name


@pytest.mark.parametrize("damage", ["one bit", "cut", "empty", "other bytes from the start"])
def test_damaged_files_are_set_aside_and_fetched_again(damage, server: Server, cache, capsys):
    name = name_of(DATA)
    url = server.add(f"/{name}", loopback.body(DATA))
    if damage == "other bytes from the start":
        cache.mkdir(parents=True)
        (cache / name).write_bytes(b"an error page")
    else:
        times = hub_file(url, PARAM).stat()
        flipped = DATA[:-1] + bytes([DATA[-1] ^ 1])
        (cache / name).write_bytes({"one bit": flipped, "cut": DATA[:99], "empty": b""}[damage])
        os.utime(cache / name, ns=(times.st_atime_ns, times.st_mtime_ns))  # bits rot without a trace
    assert hub_file(url, PARAM).read_bytes() == DATA
    assert (cache / f"{name}.corrupt").exists()
    assert "was damaged: set aside" in capsys.readouterr().out


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b'{"sha256": 3}', b"\xff", b'{"sha256": "0", "xxh3_128": null}'])
def test_a_damaged_note_only_costs_time(note, server: Server, cache):
    name = name_of(DATA)
    url = server.add(f"/{name}", loopback.body(DATA))
    hub_file(url, PARAM)
    right = (cache / f"{name}.json").read_bytes()
    (cache / f"{name}.json").write_bytes(note)
    assert hub_file(url, PARAM).read_bytes() == DATA
    assert server.counts[f"/{name}"] == 1 and (cache / f"{name}.json").read_bytes() == right


def test_a_file_that_was_renamed_with_its_note_is_not_taken_for_another(server: Server, cache):
    other = DATA[::-1]
    for data in (DATA, other):
        hub_file(server.add(f"/{name_of(data)}", loopback.body(data)), PARAM)
    for suffix in ("", ".json"):
        os.replace(cache / f"{name_of(other)}{suffix}", cache / f"{name_of(DATA)}{suffix}")
    assert hub_file(server.url(f"/{name_of(DATA)}"), PARAM).read_bytes() == DATA


def message_of(url: str, **limits: int) -> str:
    with pytest.raises(CapstanError) as caught:
        hub_file(url, PARAM, **limits)
    return str(caught.value)


def assert_helpful(message: str, url: str, cache: Path) -> None:
    assert url in message and PARAM in message and str(cache / url.rpartition("/")[2]) in message, message


def test_a_wrong_digest_is_an_error_and_nothing_is_kept_as_weights(server: Server, cache):
    name = name_of(DATA)
    wrong = b"<html>please log in</html>"
    url = server.add(f"/{name}", loopback.first(loopback.body(wrong), loopback.body(DATA)))
    message = message_of(url)
    assert_helpful(message, url, cache)
    assert hashlib.sha256(wrong).hexdigest() in message and name[4:12] in message
    assert not (cache / name).exists() and (cache / f"{name}.corrupt").read_bytes() == wrong
    assert hub_file(url, PARAM).read_bytes() == DATA


def test_offline_names_url_file_and_param(server: Server, cache, monkeypatch):
    monkeypatch.setattr(transfer, "NUM_ATTEMPTS", 2)
    with loopback.serve() as gone:
        url = gone.url("/net-01234567.pth")
    message = message_of(url)
    assert_helpful(message, url, cache)
    assert "refused" in message and "2 attempts" in message


@pytest.mark.parametrize("answer, reason", [(loopback.status(404), "HTTP 404"), (loopback.status(503), "HTTP 503")])
def test_refusing_servers_are_named(answer, reason, server: Server, cache):
    url = server.add("/net-01234567.pth", answer)
    message = message_of(url)
    assert_helpful(message, url, cache)
    assert reason in message
    assert server.counts["/net-01234567.pth"] == (1 if "404" in reason else transfer.NUM_ATTEMPTS)


def test_too_much_is_refused_and_not_kept(server: Server, cache):
    declared = server.add("/net-01234567.pth", loopback.body(DATA))
    endless = server.add("/end-01234567.pth", loopback.endless)
    for url in (declared, endless):
        message = message_of(url, max_bytes=len(DATA) - 1)
        assert_helpful(message, url, cache)
        assert f"more than the {len(DATA) - 1:,}" in message
    assert not list(cache.glob("*.part")) and not list(cache.glob("*.pth"))


def test_a_cache_that_cannot_be_written_is_named(server: Server, cache, tmp_path):
    (tmp_path / "hub").write_text("a file where a folder should be")
    url = server.add("/net-01234567.pth", loopback.body(DATA))
    assert_helpful(message_of(url), url, cache)


def test_a_full_disk_is_named(server: Server, cache, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transfer.Progress, "update", full)
    url = server.add("/net-01234567.pth", loopback.body(DATA))
    message = message_of(url)
    assert_helpful(message, url, cache)
    assert "No space left" in message


def test_torchvisions_addresses(monkeypatch):
    """Every file has a digest in its name but those of four quantised networks, which are not encoders."""
    from torchvision.models import get_model_weights, list_models

    urls = {entry.url for name in list_models() for entry in get_model_weights(name)}
    pins: dict[str, str] = {}
    monkeypatch.setattr(weights, "_is_whole", lambda *_: False)
    monkeypatch.setattr(weights, "_fetch_once", lambda url, target, pin, _: pins.update({url: pin}))
    refused = set()
    for url in urls:
        try:
            hub_file(url, PARAM)
        except CapstanError as error:
            assert "no digest in its name" in str(error) and url in str(error) and PARAM in str(error)
            refused.add(url)
    assert len(urls) > 150 and len(refused) == 4 and all("/quantized/" in url for url in refused)
    assert {len(pin) for pin in pins.values()} == {8, 10}
    assert all(url.endswith(f"-{pin}.pth") for url, pin in pins.items())


def ignoring_range(data: bytes) -> Answer:
    return loopback.body(data, ETag='"other"')


FAULTS = {
    "reset": lambda data: loopback.reset,
    "503": lambda data: loopback.status(503),
    "cut": lambda data: cut(data, len(data) // 3),
    "cut at once": lambda data: cut(data, 0),
    "changed and cut": lambda data: cut(data[::-1], len(data) // 2, '"old"'),
    "no range, cut": lambda data: loopback.broken_off(data),
}


def cut(data: bytes, num: int, etag: str = '"v"') -> Answer:
    """At most `num` more bytes, and never the last one."""

    def answer(handler: Handler) -> None:
        wanted = handler.headers.get("Range") if handler.headers.get("If-Range") == etag else None
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        handler.send_response(206 if wanted else 200)
        if wanted:
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.send_header("ETag", etag)
        handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        handler.wfile.write(data[start : min(start + num, len(data) - 1)])

    return answer


@contextmanager
def example() -> Iterator[Server]:
    """Server and cache of one example: hypothesis does not make fixtures anew."""
    with loopback.serve() as server, pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("TORCH_HOME", folder)
        patch.setattr(transfer, "BACKOFF_S", 0.0)
        yield server


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(min_size=1, max_size=4000),
    faults=st.lists(st.sampled_from(sorted(FAULTS)), max_size=transfer.NUM_ATTEMPTS - 1),
    ranged=st.booleans(),
)
def test_whatever_the_server_does_the_file_is_whole(data, faults, ranged):
    """The law of the transfer: fewer faults than attempts end in the right bytes and leave nothing else behind."""
    with example() as server:
        name = name_of(data)
        last = loopback.ranged(data, '"v"') if ranged else ignoring_range(data)
        url = server.add(f"/{name}", loopback.first(*[FAULTS[fault](data) for fault in faults], last))
        path = hub_file(url, PARAM)
        assert path.read_bytes() == data
        assert names_in(path.parent) == {name, f"{name}.json", f"{name}.lock"}


def test_a_beginning_of_other_bytes_is_thrown_away(server: Server, cache):
    """A power cut leaves a file of the right length and zeros at its end."""
    name = name_of(DATA)
    url = server.add(f"/{name}", loopback.ranged(DATA, '"v"'))
    cache.mkdir(parents=True)
    (cache / f"{name}.part").write_bytes(DATA[:1000] + bytes(3000))
    (cache / f"{name}.part.json").write_text(json.dumps({"url": url, "validator": '"v"'}))
    assert hub_file(url, PARAM).read_bytes() == DATA
    assert [seen.get("Range") for seen in server.headers_seen[f"/{name}"]] == ["bytes=4000-", None]


# Several processes


def fetching(url: str, home: Path, log: Path) -> subprocess.Popen[bytes]:
    code = "import sys; from captioning.encoders.weights import hub_file; print(hub_file(sys.argv[1], 'p'), flush=True)"
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, url],
            env=os.environ | {"TORCH_HOME": str(home)},
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def wait_until(condition, what: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def pausing(data: bytes, num: int, go: threading.Event) -> Answer:
    """`num` bytes, and the others when it is time, if ever."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("ETag", '"v"')
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:num])
        handler.wfile.flush()
        while not (go.is_set() or handler.server.stopping):
            time.sleep(0.02)
        handler.wfile.write(data[num:])

    return answer


def test_a_killed_download_goes_on_and_lets_its_lock_go(server: Server, cache, tmp_path):
    name, half = name_of(DATA), len(DATA) // 2
    stop_here = pausing(DATA, half, threading.Event())
    url = server.add(f"/{name}", loopback.first(stop_here, loopback.ranged(DATA, '"v"')))
    part = cache / f"{name}.part"
    process = fetching(url, tmp_path, tmp_path / "log")
    try:
        wait_until(lambda: part.exists() and part.stat().st_size == half, "half of it arrives")
    finally:
        process.kill()  # SIGKILL
        process.wait()
    assert part.read_bytes() == DATA[:half] and not (cache / name).exists()
    assert hub_file(url, PARAM).read_bytes() == DATA
    assert [seen.get("Range") for seen in server.headers_seen[f"/{name}"]] == [None, f"bytes={half}-"]
    assert names_in(cache) == {name, f"{name}.json", f"{name}.lock"}


def test_of_several_processes_one_fetches_and_the_others_wait(server: Server, cache, tmp_path):
    name, go = name_of(DATA), threading.Event()
    url = server.add(f"/{name}", pausing(DATA, 1000, go))
    logs = [tmp_path / f"log{i}" for i in range(3)]
    processes = [fetching(url, tmp_path, log) for log in logs]
    try:
        wait_until(lambda: sum(b"waiting for another" in log.read_bytes() for log in logs) == 2, "two of three wait")
        go.set()
        assert [process.wait(120) for process in processes] == [0, 0, 0], [log.read_text() for log in logs]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert all(str(cache / name) in log.read_text() for log in logs)
    assert server.counts[f"/{name}"] == 1
