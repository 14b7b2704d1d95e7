"""Requests and WebSockets to an ASGI app in this process, in the event loop of the test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tests.moments import PATIENCE_S


class Answer(msgspec.Struct):
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class AsgiClient:
    """Sends requests to an app.

    Args:
        peer: address that the app sees; None for a unix socket.
    """

    def __init__(self, app: Any, peer: str | None = "203.0.113.7") -> None:
        self.app = app
        self.peer = peer

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return await self.request("GET", path, headers)

    async def post(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return await self.request("POST", path, headers)

    async def request(self, method: str, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = self._scope(path, headers) | {"type": "http", "method": method}
        await asyncio.wait_for(self.app(scope, receive, send), PATIENCE_S)
        received = [(name.decode().lower(), value.decode()) for name, value in sent[0]["headers"]]
        assert len({name for name, _ in received}) == len(received), f"a header came twice: {received}"
        return Answer(sent[0]["status"], dict(received), b"".join(each.get("body", b"") for each in sent[1:]))

    async def talk(self, path: str, messages: Sequence[str], denial_response: bool = True) -> list[str | int]:
        """What a WebSocket answers to texts: texts, and the code of its close or the status of its refusal."""
        incoming = [{"type": "websocket.connect"}, *({"type": "websocket.receive", "text": each} for each in messages)]
        said: list[str | int] = []

        async def receive() -> dict[str, Any]:
            return incoming.pop(0) if incoming else {"type": "websocket.disconnect", "code": 1001}

        async def send(message: Any) -> None:
            kind = message["type"]
            if kind == "websocket.send":
                said.append(message["text"])
            elif kind == "websocket.close":
                said.append(message.get("code", 1000))
            elif kind == "websocket.http.response.start":
                said.append(message["status"])

        extensions = {"websocket.http.response": {}} if denial_response else {}
        scope = self._scope(path, None) | {"type": "websocket", "extensions": extensions, "subprotocols": []}
        await asyncio.wait_for(self.app(scope, receive, send), PATIENCE_S)
        return said

    def _scope(self, path: str, headers: Mapping[str, str] | None) -> dict[str, Any]:
        bare, _, query = path.partition("?")
        return {
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "path": bare,
            "raw_path": bare.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
            "client": None if self.peer is None else (self.peer, 4711),
            "server": ("127.0.0.1", 80),
        }
