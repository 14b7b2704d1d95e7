"""How each door answers a client that has sent too many unknown API keys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.cases.doors import FREE, POLICY
from tests.integration.client_driver import ClientDriver
from tidegate import TooManyUnknownKeys
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.catalog.unknown_keys import UnknownKeyLimit
from tidegate.counters.memory import MemoryCounters
from tidegate.doors.asgi import RateLimitMiddleware
from tidegate.doors.grpc.messages import OVER_LIMIT, RateLimitRequest, RateLimitResponse
from tidegate.doors.grpc.service import RateLimitService
from tidegate.doors.http import DataPlane
from tidegate.gate.gate import Gate
from tidegate.policy.key_format import make_api_key
from tidegate.policy.toml_reader import parse_policy
from tidegate.settings import EnvoySettings

CODE = "API_KEY_LOOKUPS_EXCEEDED"
CLIENT = "203.0.113.7"


@pytest.fixture
def gate() -> Gate:
    """A gate at which one unknown key is too many; two clients have sent it."""
    limit = UnknownKeyLimit(1)
    limit.count(CLIENT)
    return Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY)), unknown_keys=limit), MemoryCounters())


def require_told(answer: httpx.Response, status: int) -> None:
    assert answer.status_code == status
    assert answer.headers["x-tidegate-error"] == CODE
    assert 0 < int(answer.headers["retry-after"]) <= 60


async def test_http(gate: Gate, listen: Callable[..., Any]) -> None:
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:
        check = {"path": "/a", "api_key": make_api_key(), "ip": CLIENT}
        answer = await client.post("/v1/check", json=check)
        require_told(answer, 429)
        assert answer.json()["error"]["code"] == CODE
        headers = {"X-API-Key": make_api_key(), "X-Real-IP": CLIENT, "X-Original-URI": "/a"}
        answer = await client.get("/v1/authorize", headers=headers)
        require_told(answer, 429)
        assert (answer.content, answer.headers["cache-control"]) == (b"", "no-store")
        answer = await client.get("/v1/authorize", headers={**headers, "X-Tidegate-Denied-Status": "403"})
        require_told(answer, 403)
        assert answer.headers["x-tidegate-status"] == "429"
        require_told(await client.get("/v1/usage", headers=headers), 429)
        answer = await client.post("/v1/check/batch", json={"checks": [check, {**check, "ip": "203.0.113.8"}]})
        assert [each["error"]["code"] for each in answer.json()["decisions"]] == [CODE, "INVALID_API_KEY"]


async def test_the_client_raises_it(gate: Gate, listen: Callable[..., Any], new_client: Callable[..., ClientDriver]) -> None:
    asker = new_client(await listen(DataPlane(gate, {})))
    for ask in (asker.check("/a", api_key=make_api_key(), ip=CLIENT), asker.usage(api_key=make_api_key(), ip=CLIENT)):
        with pytest.raises(TooManyUnknownKeys) as refused:
            await ask
        assert 0 < int(refused.value.details["retry_after"]) <= 60  # type: ignore[call-overload]


async def test_the_middleware(gate: Gate) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("it was not let in")

    transport = httpx.ASGITransport(RateLimitMiddleware(app, gate=gate), client=(CLIENT, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        require_told(await client.get("/a", headers={"X-API-Key": make_api_key()}), 429)


async def test_envoy(gate: Gate) -> None:
    message = RateLimitRequest(domain=b"tidegate")
    descriptor = message.descriptors.add()
    for name, value in (("api_key", make_api_key()), ("path", "/a"), ("remote_address", CLIENT)):
        descriptor.entries.add(key=name.encode(), value=value.encode())
    raw = await RateLimitService(gate, EnvoySettings()).answer(message.SerializeToString())
    answer = RateLimitResponse.FromString(raw)
    assert answer.overall_code == OVER_LIMIT
    told = {header.key: header.value for header in answer.response_headers_to_add}
    assert told["x-tidegate-error"] == CODE
    assert 0 < int(told["retry-after"]) <= 60


async def test_a_known_key_passes_once_it_is_cached(gate: Gate, listen: Callable[..., Any]) -> None:
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:
        first = await client.post("/v1/check", json={"path": "/a", "api_key": FREE, "ip": CLIENT})
        assert first.status_code == 429
        assert (await client.post("/v1/check", json={"path": "/a", "api_key": FREE, "ip": "203.0.113.8"})).status_code == 200
        again = await asyncio.gather(
            *(client.post("/v1/check", json={"path": "/a", "api_key": FREE, "ip": CLIENT}) for _ in range(5))
        )
        assert {answer.status_code for answer in again} == {200}
