"""An API key that came as a bearer token is refused with the remedy; other tokens are the API's own."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cases.doors import FREE, POLICY
from tests.rsgi import call
from tests.unit.test_gate import CountingCatalog
from tidegate.catalog.cached import CachedCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.doors.asgi import RateLimitMiddleware
from tidegate.doors.http import DataPlane
from tidegate.gate.gate import Gate
from tidegate.observation import Observation
from tidegate.policy.key_format import make_api_key

JWT = b"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
DOORS = ("/v1/authorize", "/v1/authorize/envoy", "/v1/usage", "/v1/check", "/v1/check/batch", "middleware")


async def ask(gate: Gate, door: str, authorization: bytes, key: bytes = b"") -> tuple[int, str]:
    headers = [("Authorization", authorization), ("X-Original-URI", b"/api/v1/a"), ("X-Real-IP", b"192.0.2.1")]
    headers += [("X-API-Key", key)] if key else []
    if door == "middleware":
        sent: list[Any] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def send(message: Any) -> None:
            sent.append(message)

        pairs = [(name.lower().encode(), value) for name, value in headers]
        scope = {"type": "http", "method": "GET", "path": "/api/v1/a", "headers": pairs, "client": ("192.0.2.1", 1)}
        await RateLimitMiddleware(app, gate=gate)(scope, None, send)  # type: ignore[arg-type]
        return sent[0]["status"], dict(sent[0]["headers"]).get(b"x-tidegate-error", b"").decode()
    check = {"path": "/api/v1/a", "ip": "192.0.2.1"}
    body = {"/v1/check": check, "/v1/check/batch": {"checks": [check]}}.get(door)
    seen: list[Observation] = []
    answer = await call(
        DataPlane(gate, {}, seen.append), door, headers, "GET" if body is None else "POST", json.dumps(body).encode()
    )
    assert len(seen) == (answer.status in (400, 401)), "a refusal is counted once"
    return 200 if answer.status == 204 else answer.status, answer.headers.get("x-tidegate-error", "")


@pytest.mark.parametrize("door", DOORS)
async def test_a_key_that_came_as_a_bearer_token(door: str, gate: Gate) -> None:
    for refused in (
        b"Bearer " + FREE.encode(),
        b"bearer   " + FREE.encode(),
        b"BEARER " + make_api_key().encode(),
        b"Bearer tg_x",
    ):
        assert await ask(gate, door, refused) == (401, "MISSING_API_KEY")
    assert (await ask(gate, door, b"Bearer " + FREE.encode(), key=FREE.encode()))[0] == 200, "the key came where it is read"


@pytest.mark.parametrize("door", DOORS)
async def test_other_tokens_are_anonymous_as_before(door: str, gate: Gate) -> None:
    # The rule lets an anonymous caller pass once.
    assert (await ask(gate, door, b"Bearer " + JWT))[0] == 200
    for passed in (b"Bearer gho_16C7e42F292c6912E7710c838347Ae178B4a", b"Basic " + FREE.encode(), b"Bearer", b"Bearer \xff"):
        assert (await ask(gate, door, passed))[1] == ""


async def test_what_it_costs() -> None:
    catalog = CountingCatalog(POLICY)
    gate = Gate(CachedCatalog(catalog), MemoryCounters())
    for jwt in (JWT, JWT + b".e30.AAAA", JWT[: JWT.rindex(b".") + 1]):
        await ask(gate, "/v1/usage", b"Bearer " + jwt)
    assert "key" not in catalog.asked, "a JWT is not looked up"
    for _ in range(3):
        await ask(gate, "/v1/usage", b"Bearer an-opaque-session-token-1")
    assert catalog.asked.count("key") == 1
    await ask(gate, "/v1/usage", b"Bearer sk.live/of+another=service")
    assert catalog.asked.count("key") == 2, "a key of another service may have dots"
    catalog.failing = True
    assert (await ask(gate, "/v1/usage", b"Bearer an-opaque-session-token-2"))[0] == 200, "unknown tokens pass while it is away"
