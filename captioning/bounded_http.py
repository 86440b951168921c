"""urllib with limits: a body has at most so many bytes, and a whole answer at most so many seconds.

A plain socket timeout starts anew with every byte, so a slow drip never ends; and `read()` never ends on an endless
body.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
import urllib.request
from collections.abc import Callable
from typing import Any


class _DeadlineReader(io.RawIOBase):
    """A socket's bytes until a deadline."""

    def __init__(self, raw: Any, sock: socket.socket, deadline: float) -> None:
        self._raw, self._sock, self._deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        seconds = sock.gettimeout()
        if seconds is not None:  # header lines count against the deadline too
            raw = self.fp.detach()  # type: ignore[attr-defined]  # else the old reader closes it when it goes
            self.fp = io.BufferedReader(_DeadlineReader(raw, sock, time.monotonic() + seconds))


class _HttpConnection(http.client.HTTPConnection):
    response_class = _Response


class _HttpsConnection(http.client.HTTPSConnection):
    response_class = _Response


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HttpConnection, req)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HttpsConnection, req, context=self._context)  # type: ignore[attr-defined]


class _Bounded:
    """What img2dataset uses of a response (`headers`, `read()`, `with`), with a limit on the body."""

    def __init__(self, response: Any, max_bytes: int) -> None:
        self._response, self._max_bytes = response, max_bytes
        self.headers = response.headers

    def read(self) -> bytes:
        body = self._response.read(self._max_bytes + 1)
        if len(body) > self._max_bytes:
            raise ValueError(f"larger than {self._max_bytes} bytes")
        if getattr(self._response, "length", None):  # http.client counts it down to 0
            raise ConnectionError("incomplete body")
        return body

    def __enter__(self) -> _Bounded:
        return self

    def __exit__(self, *_: object) -> None:
        self._response.close()


class _Opener(urllib.request.OpenerDirector):
    max_bytes = 0
    heartbeat: Callable[[], None] = staticmethod(lambda: None)

    def open(self, *args: Any, **kwargs: Any) -> Any:
        self.heartbeat()
        response = super().open(*args, **kwargs)
        # A redirect comes through here again.
        return response if isinstance(response, _Bounded) else _Bounded(response, self.max_bytes)


def bounded_opener(max_bytes: int, heartbeat: Callable[[], None]) -> urllib.request.OpenerDirector:
    """An opener for http, https and file addresses; a request's `timeout` is for connection, headers and body together.

    Args:
        max_bytes: a longer body raises ValueError.
        heartbeat: called at each request.
    """
    opener = _Opener()
    opener.max_bytes, opener.heartbeat = max_bytes, heartbeat  # type: ignore[method-assign]
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        _HttpHandler,
        _HttpsHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.FileHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener
