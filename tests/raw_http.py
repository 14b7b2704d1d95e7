"""HTTP/1 as bytes: what a client sends that no HTTP library would send."""

from __future__ import annotations

import http.client
import io
import json
import socket
from collections.abc import Mapping
from typing import Any, NamedTuple

from tests.servers.ports import HOST


class RawAnswer(NamedTuple):
    """One answer.

    Args:
        status: of it; 0 where there is none: the connection was closed without an answer, or it is one of HTTP/0.9.
        headers: by name in lower case, of several the first.
        body: as it came.
    """

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


def exchange(port: int, request: bytes, method: str = "GET", timeout_s: float = 20.0) -> list[RawAnswer]:
    """Send bytes on a connection of their own and read all that comes back until the server closes it.

    Args:
        port: on loopback.
        request: asks for `Connection: close` itself, else this lasts until the time-out.
        method: of the request: answers to HEAD have no body.
        timeout_s: for each read.

    Returns:
        The answers; more than one where the server saw more than one request.
    """
    with socket.create_connection((HOST, port), timeout_s) as connection:
        received = b""
        try:
            connection.sendall(request)
            while chunk := connection.recv(65_536):
                received += chunk
        except ConnectionError:
            pass  # refused while more was on the way: what came before counts
    if not received.startswith(b"HTTP/"):
        return [RawAnswer(0, {}, received)]
    stream = _Stream(received)
    answers = []
    while stream.left():
        answer = http.client.HTTPResponse(stream, method=method)  # type: ignore[arg-type]
        answer.begin()
        headers = {name.lower(): value for name, value in reversed(answer.getheaders())}
        answers.append(RawAnswer(answer.status, headers, answer.read()))
        answer.close()
    return answers


def ask(port: int, path: str, method: str = "GET", headers: Mapping[str, str] | None = None) -> RawAnswer:
    """Ask for a path, spelled as it is given.

    Args:
        port: on loopback.
        path: goes into the request line unchanged.
        method: likewise.
        headers: beside Host and Connection.

    Returns:
        The answer.
    """
    lines = [f"{method} {path} HTTP/1.1", "Host: api.example", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return exchange(port, "\r\n".join([*lines, "", ""]).encode(), method)[0]


class _Stream:
    """What `HTTPResponse` takes for a socket."""

    def __init__(self, received: bytes) -> None:
        self._file = io.BytesIO(received)
        self._size = len(received)

    def makefile(self, mode: str) -> io.BufferedReader:
        # Each answer closes its file; the next one reads on.
        return _KeptOpen(self._file)  # type: ignore[return-value]

    def left(self) -> bool:
        return self._file.tell() < self._size


class _KeptOpen:
    def __init__(self, file: io.BytesIO) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def close(self) -> None:
        """Not yet."""
