"""Slots of WebSockets in the ASGI middleware: from the connection to its end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.conftest import Clock
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.doors.asgi import RateLimitMiddleware
from tidegate.gate.gate import Gate
from tidegate.policy.toml_reader import parse_policy

POLICY = """
[[tiers]]
name = "public"

  [[tiers.rules]]
  endpoint = "/chat"
  subject = "ip"
  limits = ["3/minute", "1 concurrent"]

  [[tiers.rules]]
  endpoint = "/news"
  subject = "ip"
  limits = ["1/minute"]
"""
ANONYMOUS = '[anonymous]\ntier = "public"\n'


class Sockets:
    """An app whose WebSockets stay open until a test lets them go."""

    def __init__(self, policy: str, clock: Clock) -> None:
        self.gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(policy))), MemoryCounters(clock=clock))
        self.app = RateLimitMiddleware(self._serve, gate=self.gate)
        self.entered = 0
        self.go = asyncio.Event()

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        self.entered += 1
        await self.go.wait()
        await send({"type": "websocket.close", "code": 1000})

    async def connect(self, path: str = "/chat", **extensions: Any) -> list[dict[str, Any]]:
        """All that is sent to the client."""
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        scope = {"type": "websocket", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": []}
        await self.app({**scope, "client": ("192.0.2.1", 5), "extensions": extensions}, receive, send)
        return sent

    async def is_serving(self, connections: int) -> None:
        while self.entered < connections:
            await asyncio.sleep(0)


async def test_a_websocket_has_a_slot_until_it_is_closed(clock: Clock) -> None:
    sockets = Sockets(POLICY + ANONYMOUS, clock)
    first = asyncio.ensure_future(sockets.connect())
    await sockets.is_serving(1)
    assert [each["type"] for each in await sockets.connect()] == ["websocket.close"]
    refused = await sockets.connect(**{"websocket.http.response": {}})
    assert (refused[0]["type"], refused[0]["status"]) == ("websocket.http.response.start", 429)
    # A client that leaves: its server cancels the app.
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.ensure_future(sockets.connect())
    await sockets.is_serving(2)
    sockets.go.set()
    assert [each["type"] for each in await second] == ["websocket.accept", "websocket.close"]
    assert [each["type"] for each in await sockets.connect()] == ["websocket.accept", "websocket.close"]
    # A connection is charged to the other limits of the rule.
    assert [each["type"] for each in await sockets.connect()] == ["websocket.close"]
    await sockets.gate.close()


async def test_other_websockets_pass(clock: Clock) -> None:
    sockets = Sockets(POLICY + ANONYMOUS, clock)
    sockets.go.set()
    for _ in range(3):
        assert [each["type"] for each in await sockets.connect("/news")] == ["websocket.accept", "websocket.close"]
    # An escape that Tidegate does not read would hide the path of a rule from it.
    refused = await sockets.connect("/ch%61t", **{"websocket.http.response": {}})
    assert refused[0]["status"] == 400
    # Who connects is not known to a policy without anonymous callers.
    unknown = Sockets(POLICY, clock)
    unknown.go.set()
    assert [each["type"] for each in await unknown.connect()] == ["websocket.accept", "websocket.close"]
