"""ASGI applications on `HttpServer`: the control plane is one.

A body is handed over in pieces as it arrives, and bounded by the application. An answer is sent as a whole: nothing in the
control plane streams. What `HttpServer` bounds (connections, headers, time) is bounded here too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias
from urllib.parse import unquote

from tidegate.doors.http_exchange import Exchange

Message: TypeAlias = MutableMapping[str, Any]
AsgiApp: TypeAlias = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]

_ASGI: Final = {"version": "3.0", "spec_version": "2.4"}


class AsgiAdapter:
    """Answers the exchanges of `HttpServer` with an ASGI application, without lifespan events.

    Args:
        app: the application.
    """

    def __init__(self, app: AsgiApp) -> None:
        self._app = app

    async def __rsgi__(self, exchange: Exchange, _: Exchange) -> None:
        """Answer one request; an application that returns without an answer leaves that to the server."""
        # Until it first waits, a request runs outside any task; applications need one (`asyncio.timeout` does).
        await asyncio.sleep(0)
        pieces = exchange.__aiter__()
        status, headers, body = 0, [], bytearray()

        async def receive() -> Message:
            piece = await anext(pieces, None)
            if piece is None:
                if exchange.answered or exchange.connection.lost:
                    return {"type": "http.disconnect"}
                return {"type": "http.request", "body": b"", "more_body": False}
            return {"type": "http.request", "body": piece, "more_body": True}

        async def send(message: Message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [
                    (name.decode("latin-1").lower(), value.decode("latin-1"))
                    for name, value in message.get("headers", ())
                    if name.lower() != b"content-length"  # the server counts the body itself
                ]
            elif message["type"] == "http.response.body":
                body.extend(message.get("body", b""))
                if not message.get("more_body"):
                    exchange.response_bytes(status, headers, bytes(body))

        await self._app(_scope(exchange), receive, send)


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
