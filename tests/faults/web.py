"""A web server on loopback that half of the time fails, and a table of its pictures, for downloads that are killed.

Every address fails at each other request, so one retry is always enough, whatever was killed in between; what can never
be fetched is in the table too, and must be in every run's ledger with the same reason.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import loopback

NUM_IMAGES = 24
TABLE = "table.csv"
SETTINGS: dict[str, Any] = {
    "data": {"sources": ["url_table"]},
    "source_settings": {"url_table": {"table": TABLE, "split_column": "split", "id_column": "id"}},
    "download": {"samples_per_shard": 7, "timeout_s": 2, "num_retries": 2, "max_failure_rate": 0.3, "image_px": 32},
}
EXCLUSIVE = threading.Lock()
"""One case at a time: two would take each other's good answers."""
_port = 0


class _Server(loopback.Server):
    """At a port of ours, if it is free: addresses are in the ledger, so an interrupted matrix needs the same again."""

    def __init__(self, port: int) -> None:
        ThreadingHTTPServer.__init__(self, ("127.0.0.1", port), loopback.Handler)
        self.answers, self.headers_seen = {}, {}
        self.counts = loopback.Counter()


def _alternately(*answers: loopback.Answer) -> loopback.Answer:
    lock, number = threading.Lock(), [0]

    def answer(handler: loopback.Handler) -> None:
        with lock:
            number[0] += 1
            chosen = answers[(number[0] - 1) % len(answers)]
        chosen(handler)

    return answer


def _fill(server: loopback.Server) -> None:
    for number in range(NUM_IMAGES):
        picture = loopback.jpeg(number)
        failures = [
            loopback.status(503),
            loopback.status(429, Retry_After="0"),
            loopback.reset,
            loopback.broken_off(picture),
            loopback.status(500),
        ]
        server.add(f"/{number}.jpg", _alternately(failures[number % len(failures)], loopback.body(picture)))
    server.add("/html.jpg", loopback.body(b"<html>gone</html>"))
    server.add("/loop.jpg", loopback.redirect("/loop.jpg"))
    server.add("/half.jpg", loopback.body(loopback.jpeg(1, 200, 200)[:2000]))


@contextmanager
def serve(folder: Path) -> Iterator[bool]:
    """Serves; the port is kept in `folder`. Yields whether it is the one that the last run there had."""
    global _port
    note = folder / "web-port"
    wanted = int(note.read_text()) if note.exists() else 0
    try:
        server = _Server(wanted)
    except OSError:  # somebody has it now
        server = _Server(0)
    _port = server.server_address[1]
    note.write_text(str(_port))
    _fill(server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield _port == wanted
    finally:
        server.stopping = True
        server.shutdown()
        thread.join()
        server.server_close()


def table() -> str:
    """CSV of all addresses, the hopeless ones among them."""
    names = [f"{number}.jpg" for number in range(NUM_IMAGES)]
    names[5:5], names[17:17] = ["html.jpg", "none.jpg"], ["loop.jpg", "half.jpg"]
    lines = ["id,url,caption,split"]
    for number, name in enumerate(names):
        split = ("train", "val", "test")[number % 3]
        lines.append(f"{number},http://127.0.0.1:{_port}/{name},a dog number {number},{split}")
    return "\n".join(lines) + "\n"
