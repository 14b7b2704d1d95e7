"""Where requests carry API keys."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.rsgi import call
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.doors.asgi import RateLimitMiddleware
from tidegate.doors.http import DataPlane
from tidegate.doors.key_sources import KeySources
from tidegate.errors import SettingsError
from tidegate.gate.gate import Gate
from tidegate.policy.toml_reader import parse_policy

KEY = "a-key-of-acme-0001"
POLICY = f"""
[[tiers]]
name = "pro"
[[tiers.rules]]
endpoint = "/*"
limits = ["10/day"]
[[tiers]]
name = "anonymous"
[[customers]]
name = "acme"
tier = "pro"
[[api_keys]]
key = "{KEY}"
customer = "acme"
[anonymous]
tier = "anonymous"
"""
ALL = ("header:X-Custom-Key", "bearer", "query:api_key")
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl"


def _gate() -> Gate:
    return Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), MemoryCounters())


def _client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app, client=("192.0.2.1", 1)), base_url="http://t")


@pytest.mark.parametrize(
    ("headers", "uri", "status", "tier"),
    [
        ({"X-Custom-Key": KEY}, "/a", 204, "pro"),
        ({"Authorization": f"Bearer {KEY}"}, "/a", 204, "pro"),
        ({"authorization": f"bearer {KEY}"}, "/a?api_key=unread", 204, "pro"),
        ({}, f"/a?x=1&api_key={KEY.replace('-', '%2D')}", 204, "pro"),
        ({"X-API-Key": KEY}, "/a", 204, "anonymous"),
        ({"Authorization": f"Bearer {JWT}"}, "/a", 204, "anonymous"),
        ({"Authorization": "Basic abc"}, "/a", 204, "anonymous"),
        ({"Authorization": "Bearer unknown-token"}, "/a", 401, None),
        ({}, "/a?api_key=unknown", 401, None),
        ({}, f"/a?api_key={KEY}&api_key={KEY}", 400, None),
    ],
)
async def test_authorize_reads_the_configured_sources(headers: dict[str, str], uri: str, status: int, tier: str | None) -> None:
    plane = DataPlane(_gate(), {}, keys=KeySources(ALL))
    sent = {**headers, "X-Original-URI": uri}
    answer = await call(plane, "/v1/authorize", [(name, value.encode()) for name, value in sent.items()])
    assert (answer.status, answer.headers.get("x-tidegate-tier")) == (status, tier), answer
    if tier == "pro":
        assert answer.headers["x-tidegate-customer"] == "acme"
        assert len(answer.headers["x-tidegate-key-id"]) == 24
        assert answer.headers["x-tidegate-rule"] == "/*"
    else:
        assert "x-tidegate-customer" not in answer.headers


async def test_the_middleware_reads_the_configured_sources() -> None:
    seen: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(1)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with _client(RateLimitMiddleware(app, gate=_gate(), key_sources=ALL)) as client:
        found = [
            await client.get("/a", headers={"Authorization": f"Bearer {KEY}"}),
            await client.get("/a", params={"api_key": KEY}),
            await client.get("/a", headers={"Authorization": "Bearer unknown"}),
        ]
    assert [(each.status_code, each.headers.get("x-ratelimit-remaining")) for each in found] == [
        (200, "9"),
        (200, "8"),
        (401, None),
    ]
    assert len(seen) == 2


@pytest.mark.parametrize(
    "wrong", [(), ("header:Authorization",), ("cookie:a",), ("bearer", "bearer"), ("query:a b",), ("header:",)]
)
def test_wrong_sources_are_refused(wrong: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError, match=r"keys\.sources"):
        KeySources(wrong)
