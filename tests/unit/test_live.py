"""Live answers of the control plane: what a stream sends, what it refuses, and when it ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import delete

from tests.integration.admin_api import TOKEN, Admin, open_admin
from tests.moments import PATIENCE_S
from tests.servers.ports import free_port
from tidegate.catalog.sql.tables import console_sessions
from tidegate.doors.admin import live
from tidegate.doors.admin.app import ConsoleOptions
from tidegate.doors.http_asgi import AsgiAdapter
from tidegate.server.listener import Listener


class Server:
    """A control plane on a port of its own."""

    def __init__(self, admin: Admin, listener: Listener, port: int) -> None:
        self.admin = admin
        self.listener = listener
        self.base = f"http://127.0.0.1:{port}/admin/v1"

    def client(self, token: str | None = TOKEN) -> httpx.AsyncClient:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx.AsyncClient(base_url=self.base, headers=headers, timeout=PATIENCE_S)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    admin = await open_admin(f"sqlite:///{tmp_path}/tidegate.db", console=ConsoleOptions())
    port = free_port()
    listener = Listener(AsgiAdapter(admin.app), "127.0.0.1", port)
    await listener.start()
    yield Server(admin, listener, port)
    await listener.stop(5)
    await admin.http.aclose()
    await admin.catalog.close()


class Events:
    """The events of a stream, one after another."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.aiter_lines()

    async def next(self) -> tuple[str, Any]:
        """Name and data of the next event."""
        name = "message"
        async with asyncio.timeout(PATIENCE_S):
            async for line in self._lines:
                field, _, value = line.partition(": ")
                if field == "event":
                    name = value
                elif field == "data":
                    return name, json.loads(value)
        return "over", None


async def test_a_stream_sends_answers_when_they_change_and_ends_when_the_server_stops(server: Server) -> None:
    await server.admin.tier()
    paths = [("path", "/tiers?limit=10"), ("path", "/api-keys/0123456789abcdef01234567"), ("path", "/tiers?limit=x")]
    async with server.client() as http, http.stream("GET", "/live", params=paths) as response:
        assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert (response.headers["cache-control"], "content-length" in response.headers) == ("no-store", False)
        assert "frame-ancestors" in response.headers["content-security-policy"]
        events = Events(response)
        name, first = await events.next()
        assert (name, first["path"], first["status"]) == ("message", "/tiers?limit=10", 200)
        assert [each["name"] for each in first["body"]["items"]] == ["free"]
        missing, invalid = (await events.next())[1], (await events.next())[1]
        assert (missing["status"], missing["body"]["error"]["code"]) == (404, "NOT_FOUND")
        assert (invalid["status"], invalid["body"]["error"]["code"]) == (400, "BAD_REQUEST")
        await server.admin.tier("pro")
        changed = (await events.next())[1]
        assert [each["name"] for each in changed["body"]["items"]] == ["free", "pro"]
        stopping = asyncio.create_task(server.listener.stop(PATIENCE_S))
        assert await events.next() == ("over", None)
        await stopping


async def test_a_stream_ends_with_its_session_and_sends_heartbeats(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_PRINCIPAL_S", 0.0)
    monkeypatch.setattr(live, "_HEARTBEAT_S", 0.0)
    async with server.client(None) as http:
        assert (await http.post("/session", json={"token": TOKEN})).status_code == 201
        async with http.stream("GET", "/live", params={"path": "/tiers"}) as response:
            events = Events(response)
            assert (await events.next())[1]["path"] == "/tiers"
            assert await events.next() == ("heartbeat", {})
            async with server.admin.catalog.database.transaction() as connection:
                await connection.execute(delete(console_sessions))
            while (found := await events.next())[0] == "heartbeat":
                pass
            assert found == ("end", {})
            assert await events.next() == ("over", None)


async def test_what_cannot_be_streamed_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async with server.client() as http:
        for path in (
            "/tokens",
            "/live?path=/system",
            "/usage/export",
            "tiers",
            "/api-keys/a/b",
            "/tiers?name=\u00e9",
            "/tiers?" + "a" * 4000,
        ):
            refused = await http.get("/live", params={"path": path})
            assert (refused.status_code, "cannot be streamed" in refused.json()["error"]["message"]) == (400, True), path
        many = await http.get("/live", params=[("path", f"/tiers?limit={n}") for n in range(1, live.MAX_PATHS + 2)])
        assert (many.status_code, many.json()["error"]["message"]) == (400, "9 paths: send 1 to 8")
        assert (await http.get("/live")).status_code == 400
        monkeypatch.setattr(live, "MAX_STREAMS_PER_PRINCIPAL", 1)
        # That a client has left is noticed when something is sent to it: at once, not after seconds.
        monkeypatch.setattr(live, "_HEARTBEAT_S", 0.0)
        async with http.stream("GET", "/live", params={"path": "/system"}) as response:
            await Events(response).next()
            refused = await http.get("/live", params={"path": "/system"})
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "10")
        # The one that left makes room.
        async with asyncio.timeout(PATIENCE_S):
            while True:
                async with http.stream("GET", "/live", params={"path": "/system"}) as response:
                    if response.status_code == 200:
                        assert (await Events(response).next())[1]["path"] == "/system"
                        break
                await asyncio.sleep(0.05)
    async with server.client(None) as http:
        assert (await http.get("/live", params={"path": "/system"})).status_code == 401


def test_a_large_answer_is_only_reported() -> None:
    large = live.Answer(200, b'"' + b"a" * live.MAX_BODY_BYTES + b'"')
    assert live.event_of("/tiers", large) == b'data: {"path":"/tiers","status":200,"body":null}\n\n'
    assert live.event_of("/x", live.Answer(204, b"")) == b'data: {"path":"/x","status":204,"body":null}\n\n'
