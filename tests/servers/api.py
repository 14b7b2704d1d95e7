"""A back end that says what reached it."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from tests.servers.ports import HOST

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Api:
    """Answers every request on a loopback port with 200 and JSON: method and path as they came, and headers with all values.

    It reads `Content-Length` bodies only, and keeps connections open. `received` has what it answered.

    Args:
        headers: that every answer has besides.
    """

    def __init__(self, headers: Mapping[str, str] | None = None) -> None:
        self.received: list[dict[str, Any]] = []
        more = dict(headers or {})
        keep = self.received
        self._connections: set[socket.socket] = set()
        connections = self._connections

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                connections.add(self.connection)

            def finish(self) -> None:
                connections.discard(self.connection)
                super().finish()

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                words = self.requestline.split(" ")
                seen = {
                    "method": words[0],
                    "path": words[1],
                    "headers": {name.lower(): self.headers.get_all(name) for name in self.headers},
                    "body": body.decode("latin-1"),
                }
                keep.append(seen)
                answer = json.dumps(seen).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                # One that has limits of its own.
                self.send_header("X-RateLimit-Limit", "7")
                for name, value in more.items():
                    self.send_header(name, value)
                self.end_headers()
                if words[0] != "HEAD":
                    self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        for method in _METHODS:
            setattr(Handler, f"do_{method}", Handler.answer)
        self._server = http.server.ThreadingHTTPServer((HOST, 0), Handler)
        self._server.daemon_threads = False
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()
