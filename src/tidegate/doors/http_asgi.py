"""ASGI applications on `HttpServer`: the control plane is one.

A body is handed over in pieces as it arrives, and bounded by the application. A response whose first piece is also its last
one is sent as a whole. Any other is a stream: each piece is sent when the application gives it, the end of the connection is the
end of the response, and the application is disconnected when the server stops. What `HttpServer` bounds (connections, headers,
time in which a client must read) is bounded here too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias
from urllib.parse import unquote

from tidegate.doors.http_exchange import PHRASES, Exchange
from tidegate.doors.responses import Headers

Message: TypeAlias = MutableMapping[str, Any]
AsgiApp: TypeAlias = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]

_ASGI: Final = {"version": "3.0", "spec_version": "2.4"}
_BLOCKED_POLL_S: Final = 0.05


class AsgiAdapter:
    """Answers the exchanges of `HttpServer` with an ASGI application, without lifespan events."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app

    async def __rsgi__(self, exchange: Exchange, _: Exchange) -> None:
        """Answer one request; an application that returns without an answer leaves that to the server."""
        # Until it first waits, a request runs outside any task; applications need one (`asyncio.timeout` does).
        await asyncio.sleep(0)
        pieces = exchange.__aiter__()
        status, headers = 0, []
        stream: _Stream | None = None

        async def receive() -> Message:
            piece = await anext(pieces, None)
            if piece is None:
                if exchange.connection.lost or (exchange.answered if stream is None else exchange.connection.closing):
                    return {"type": "http.disconnect"}
                return {"type": "http.request", "body": b"", "more_body": False}
            return {"type": "http.request", "body": piece, "more_body": True}

        async def send(message: Message) -> None:
            nonlocal status, headers, stream
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [
                    (name.decode("latin-1").lower(), value.decode("latin-1"))
                    for name, value in message.get("headers", ())
                    if name.lower() != b"content-length"  # the server counts the body itself
                ]
            elif message["type"] == "http.response.body":
                body, is_last = message.get("body", b""), not message.get("more_body")
                if stream is None and is_last:
                    exchange.response_bytes(status, headers, body)
                    return
                if stream is None:
                    stream = _Stream(exchange, status, headers)
                await stream.write(body)
                if is_last:
                    stream.end()

        try:
            await self._app(_scope(exchange), receive, send)
        finally:
            if stream is not None:
                stream.end()


class _Stream:
    """A response that is sent in pieces.

    Args:
        exchange: what is answered.
        status: of the response.
        headers: names in lower case.
    """

    def __init__(self, exchange: Exchange, status: int, headers: Headers) -> None:
        self._exchange = exchange
        self._is_over = False
        lines = [f"{name}: {value}\r\n" for name, value in (*headers, ("connection", "close"))]
        head = PHRASES[status] + exchange.connection.server.date_line + "".join(lines)
        if head.count("\n") != len(lines) + 2:
            raise ValueError("a header value has a line break")
        exchange.answered = True
        exchange.connection.send(f"{head}\r\n".encode())

    async def write(self, piece: bytes) -> None:
        """Send a piece, after the client has read what was sent before.

        Raises:
            ConnectionResetError: if the client is gone.
        """
        connection = self._exchange.connection
        while connection in connection.server.blocked and not connection.lost:
            await asyncio.sleep(_BLOCKED_POLL_S)
        if connection.lost or self._is_over:
            raise ConnectionResetError("the client has left")
        if piece and self._exchange.method != "HEAD":
            connection.send(piece)

    def end(self) -> None:
        """End the response, and the connection with it; once."""
        if not self._is_over:
            self._is_over = True
            self._exchange.connection.answer(self._exchange, b"", closes=True)


def _scope(exchange: Exchange) -> dict[str, Any]:
    host, _, port = exchange.client.rpartition(":")
    return {
        "type": "http",
        "asgi": _ASGI,
        "http_version": exchange.version,
        "method": exchange.method,
        "scheme": "http",
        "path": unquote(exchange.path),
        "raw_path": exchange.path.encode("latin-1"),
        "query_string": exchange.query_string.encode("latin-1"),
        "root_path": "",
        "headers": exchange.headers.raw(),
        "client": (host.strip("[]"), int(port)) if host else None,
        "server": None,
    }
