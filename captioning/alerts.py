"""Alerts: said once on stderr, kept in alerts.jsonl, and sent by apprise (e-mail, Slack, a webhook) where asked for.

Apprise runs in a process of its own. So it can neither slow a training step nor draw from the stage's random numbers,
and an address that never answers costs nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from captioning import health_records

MAX_BYTES = 1_000_000
SEND_SECONDS = 30


def say(message: str) -> None:
    """A line on stderr in one piece: `print` writes its end apart, and another thread's line may come between."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


class Alerts:
    """One stage's open alerts. Safe to call from any thread; never raises."""

    def __init__(
        self, folder: Path, stage: str, run: str, notify_urls: Sequence[str], complain: Callable[[str, Exception], None]
    ) -> None:
        self._path, self._stage, self._run = folder / health_records.ALERTS, stage, run
        self._urls, self._complain = list(notify_urls), complain
        self._open: set[str] = set()
        self._lock = threading.Lock()
        self._outbox: list[str] = []
        self._sender: subprocess.Popen[bytes] | None = None
        self._sending_until = 0.0

    def alert(self, kind: str, message: str, value: float | None = None, threshold: float | None = None) -> None:
        """Warns once; again only after `clear(kind)`."""
        with self._lock:
            if kind in self._open:
                return
            self._open.add(kind)
            if self._urls:
                self._outbox.append(message)
        say(f"WARNING: {message}")
        self._keep({"kind": kind, "value": value, "threshold": threshold, "message": message})

    def clear(self, kind: str) -> None:
        """Ends an alert; nothing where there is none."""
        with self._lock:
            if kind not in self._open:
                return
            self._open.remove(kind)
        self._keep({"kind": kind, "cleared": True})

    def _keep(self, record: dict[str, Any]) -> None:
        line = {"time": round(time.time(), 3), "stage": self._stage, "run": self._run, **record}
        try:
            health_records.append(self._path, line, fresh=True)
            health_records.bound(self._path, MAX_BYTES, health_records.newer_half)
        except OSError as error:  # a full disk is a thing to alert about: the warning itself must not fail on it
            self._complain("alerts.jsonl", error)

    def busy(self) -> bool:
        """Whether a notification is still to be sent or on its way."""
        with self._lock:
            return bool(self._outbox) or self._sender is not None

    def deliver(self) -> None:
        """Sends what has gathered, in one message, unless one is on its way; called now and then by one thread."""
        if self._sender is not None and not self._finish_sender():
            return
        with self._lock:
            messages, self._outbox = self._outbox, []
        if not messages:
            return
        try:
            self._send(messages)
        except Exception as error:
            self._complain("notifications", error)

    def _send(self, messages: list[str]) -> None:
        # Addresses hold passwords: they go through a pipe, where no list of processes shows them.
        command = [sys.executable, "-c", "from captioning.alerts import send_from_pipe; send_from_pipe()"]
        letter = {"urls": self._urls, "title": f"Capstan: {self._stage}", "body": "\n".join(messages)}
        sender = subprocess.Popen(
            command, cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        self._sender, self._sending_until = sender, time.monotonic() + SEND_SECONDS
        assert sender.stdin
        with sender.stdin as pipe:
            pipe.write(json.dumps(letter).encode())

    def _finish_sender(self) -> bool:
        sender = self._sender
        assert sender and sender.stderr
        if sender.poll() is None:
            if time.monotonic() < self._sending_until:
                return False
            sender.kill()
        with sender.stderr as pipe:
            said = pipe.read(2000).decode(errors="replace").strip()
        if sender.wait():
            self._complain("notifications", RuntimeError(said.splitlines()[-1] if said else "no answer in time"))
        with self._lock:
            self._sender = None
        return True

    def finish(self, seconds: float) -> None:
        """Waits for what is on its way, and gives up after so many seconds."""
        until = time.monotonic() + seconds
        while self.busy() and time.monotonic() < until:
            self.deliver()
            time.sleep(0.02)
        if self._sender is not None:
            self._sending_until = 0.0
            self._finish_sender()


def send_from_pipe() -> None:
    """The sending process: a letter as JSON on stdin; ends with 1 and the reason on stderr where an address fails."""
    import logging
    import signal

    signal.alarm(SEND_SECONDS)  # the stage may be gone by now: nothing of it stays behind
    logging.disable(logging.CRITICAL)  # apprise would print addresses
    letter = json.load(sys.stdin)
    failed = [
        f"notify_urls[{index}] ({url.split(':', 1)[0][:20]}): {reason}"
        for index, url in enumerate(letter["urls"])
        if (reason := _notify(os.path.expandvars(url), letter["title"], letter["body"]))
    ]
    if failed:
        sys.exit("; ".join(failed))


def _notify(url: str, title: str, body: str) -> str | None:
    from apprise import Apprise, NotifyType

    apprise = Apprise()
    if not apprise.add(url):
        return "no address that apprise knows (is its environment variable set?)"
    if not apprise.notify(body=body, title=title, notify_type=NotifyType.WARNING):
        return "could not be delivered"
    return None
