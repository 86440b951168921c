"""img2dataset against a web server that misbehaves in every way we know."""

from __future__ import annotations

import signal
import tarfile
import urllib.request
from pathlib import Path

import loopback
import pytest
from loopback import Server, jpeg

from captioning import fetching
from captioning.fetching import classify, fetch


@pytest.fixture
def server():
    with loopback.serve() as server:
        yield server


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(fetching, "BACKOFF_S", 0.05)


def run(urls: list[str], folder: Path, num_retries: int = 0, **options: int):
    return fetch(
        urls,
        folder / "raw",
        **{"timeout_s": 3, "num_threads": 8, "max_bytes": 200_000, **options},
        num_retries=num_retries,
    )


def test_bytes_arrive_as_they_are_and_in_order(server: Server, tmp_path):
    images = [jpeg(seed) for seed in range(12)]
    urls = [server.add(f"/{i}.jpg", loopback.body(data)) for i, data in enumerate(images)]
    local = tmp_path / "with space #1.jpg"
    local.write_bytes(jpeg(99))
    found = run([*urls, local.as_uri()], tmp_path)
    assert [outcome.read() for outcome in found] == [*images, jpeg(99)]
    assert all(outcome.status == "" for outcome in found)


def test_failures_are_sorted_by_kind(server: Server, tmp_path):
    add = server.add
    loop = add("/loop", loopback.redirect("/loop"))
    expected = {
        add("/gone", loopback.status(404)): ("permanent", "HTTP 404"),
        add("/410", loopback.status(410)): ("permanent", "HTTP 410"),
        add("/403", loopback.status(403)): ("permanent", "HTTP 403"),
        loop: ("permanent", "redirect loop"),
        add("/endless", loopback.endless): ("permanent", "too large"),
        add("/huge", loopback.body(bytes(200_001))): ("permanent", "too large"),
        add("/robots", loopback.body(jpeg(), X_Robots_Tag="noai")): ("permanent", "use disallowed by X-Robots-Tag"),
        "http://nowhere.invalid/x.jpg": ("permanent", "unknown host"),
        (tmp_path / "absent.jpg").as_uri(): ("permanent", "no such file"),
        tmp_path.as_uri(): ("permanent", "no such file"),
        "": ("permanent", "bad address"),
        "gopher://x/y": ("permanent", "bad address"),
        "ftp://127.0.0.1/x.jpg": ("permanent", "bad address"),
        "http://127.0.0.1/a b": ("permanent", "bad address"),
        add("/429", loopback.status(429)): ("transient", "HTTP 429"),
        add("/500", loopback.status(500)): ("transient", "HTTP 500"),
        add("/503", loopback.status(503)): ("transient", "HTTP 503"),
        add("/reset", loopback.reset): ("transient", "connection reset"),
        add("/half", loopback.broken_off(jpeg())): ("transient", "connection broke off"),
        add("/drip", loopback.drip): ("transient", "timeout"),
        add("/slowhead", loopback.drip_headers): ("transient", "timeout"),
        "http://127.0.0.1:1/x.jpg": ("transient", "connection refused"),
    }
    good = add("/good", loopback.body(jpeg()))
    found = run([*expected, good], tmp_path)
    names = dict(zip(expected, found[:-1], strict=True))
    if names["http://nowhere.invalid/x.jpg"].reason == "name server failed":  # a machine without any name server
        expected["http://nowhere.invalid/x.jpg"] = ("transient", "name server failed")
    assert {url: (outcome.status, outcome.reason) for url, outcome in names.items()} == expected
    assert found[-1].read() == jpeg()


def test_only_transient_failures_are_tried_again_and_not_for_ever(server: Server, tmp_path):
    urls = [
        server.add("/later", loopback.first(loopback.status(429), loopback.status(503), loopback.body(jpeg(1)))),
        server.add("/never", loopback.status(500)),
        server.add("/gone", loopback.status(404)),
        server.add("/reset", loopback.first(loopback.reset, loopback.body(jpeg(2)))),
        server.add("/good", loopback.body(jpeg(3))),
    ]
    later, never, gone, once, good = run(urls, tmp_path, num_retries=2)
    assert (later.read(), once.read(), good.read()) == (jpeg(1), jpeg(2), jpeg(3))
    assert (never.status, never.reason, gone.status) == ("transient", "HTTP 500", "permanent")
    assert server.counts == {"/later": 3, "/never": 3, "/gone": 1, "/reset": 2, "/good": 1}


def test_a_redirect_is_followed(server: Server, tmp_path):
    server.add("/there", loopback.body(jpeg()))
    assert run([server.add("/here", loopback.redirect("/there"))], tmp_path)[0].read() == jpeg()


def test_a_redirect_to_a_local_file_is_not_followed(server: Server, tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg())
    outcome = run([server.add("/x", loopback.redirect(secret.as_uri()))], tmp_path)[0]
    assert outcome.status == "permanent"


def test_a_cut_raw_tar_loses_only_what_is_behind_the_cut(tmp_path, monkeypatch):
    """img2dataset calls a shard done although its tar is truncated; what is missing counts as a failure."""
    urls = []
    for seed in range(6):
        (tmp_path / f"{seed}.jpg").write_bytes(jpeg(seed))
        urls.append((tmp_path / f"{seed}.jpg").as_uri())
    run(urls, tmp_path, num_threads=1)
    raw = tmp_path / "raw" / "0" / "raw"
    tar = next(raw.glob("*.tar"))
    with tarfile.open(tar) as members:
        third = [info for info in members if info.name.endswith(".jpg")][2]
    with tar.open("r+b") as file:
        file.truncate(third.offset_data + third.size - 1)
    found = fetching._collect(6, raw)
    whole = [outcome for outcome in found if outcome.status == ""]
    assert len(whole) == 2 and {outcome.read() for outcome in whole} <= {jpeg(seed) for seed in range(6)}
    assert {(outcome.status, outcome.reason) for outcome in found if outcome.status} == {
        ("transient", "img2dataset gave up")
    }


def test_nothing_of_img2dataset_stays_behind(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    run([(tmp_path / "absent").as_uri()], tmp_path)
    from importlib import import_module

    module = import_module("img2dataset.main")
    assert module.LoggerProcess.__module__ == "img2dataset.logger"
    assert signal.getsignal(signal.SIGINT) is handler
    assert urllib.request._opener is None


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("HTTP Error 404: Not Found", ("permanent", "HTTP 404")),
        ("HTTP Error 408: Request Timeout", ("transient", "HTTP 408")),
        ("HTTP Error 502: Bad Gateway", ("transient", "HTTP 502")),
        ("<urlopen error [Errno -2] Name or service not known>", ("permanent", "unknown host")),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", ("transient", "name server failed")),
        ("<urlopen error [Errno -5] No address associated with hostname>", ("permanent", "unknown host")),
        ("<urlopen error [Errno 111] Connection refused>", ("transient", "connection refused")),
        ("<urlopen error timed out>", ("transient", "timeout")),
        ("The read operation timed out", ("transient", "timeout")),
        ("[Errno 104] Connection reset by peer", ("transient", "connection reset")),
        ("Remote end closed connection without response", ("transient", "connection broke off")),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED]>", ("permanent", "certificate not valid")),
        ("something new", ("transient", "network error")),
    ],
)
def test_classify(message: str, expected: tuple[str, str]):
    assert classify(message) == expected
