"""Headers with every limit of a check: one table of cases through every door, in memory and on Redis with leases."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.conftest import Serve
from tests.integration.ratelimit_client import headers as rls_headers
from tests.integration.ratelimit_client import request
from tests.servers.redis_server import RedisServer
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.client import read_limit_headers
from tidegate.counters import CounterStore
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.leased import LeasedCounters
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Check
from tidegate.doors.asgi import RateLimitMiddleware
from tidegate.doors.grpc.messages import RateLimitResponse
from tidegate.doors.grpc.service import RateLimitService
from tidegate.doors.http import DataPlane
from tidegate.gate.gate import Gate
from tidegate.policy.toml_reader import parse_policy
from tidegate.settings import EnvoySettings

KEY: Final = "a-key-of-a-customer-1"
POLICY: Final = f"""
[[tiers]]
name = "pro"
limits = ["90/day"]
quotas = ["1000/month"]
  [[tiers.rules]]
  endpoint = "/few"
  name = "few"
  limits = ["3/hour", "80/day"]
  algorithm = "fixed_window"
  [[tiers.rules]]
  endpoint = "/many"
  name = "many"
  limits = ["500/hour"]
  algorithm = "token_bucket"
  quotas = ["70/year"]

[[api_keys]]
key = "{KEY}"
tier = "pro"

[anonymous]
tier = "pro"
"""
NUMBERS: Final = re.compile(r'"([^"]+)";r=(\d+);t=\d+')
CASES: Final = {
    "/few": [
        [("3/hour", 2), ("80/day", 79), ("tier 90/day", 89), ("quota 1000/month", 999)],
        [("3/hour", 1), ("80/day", 78), ("tier 90/day", 88), ("quota 1000/month", 998)],
    ],
    "/many": [
        [("rule quota 70/year", 69), ("500/hour burst 500", 499), ("tier 90/day", 89), ("quota 1000/month", 999)],
    ],
    "/other": [[("tier 90/day", 89), ("quota 1000/month", 999)]],
}
"""By path, for each request what `RateLimit` says, the limit with the least left first."""


def members(header: str) -> list[tuple[str, int]]:
    return [(name, int(left)) for name, left in NUMBERS.findall(header)]


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest, redis_server: RedisServer) -> AsyncIterator[CounterStore]:
    if request.param == "memory":
        yield MemoryCounters()
        return
    redis = LeasedCounters(GuardedCounters(RedisCounters(redis_server.url, 30)))
    redis_server.call("FLUSHALL")
    yield redis
    await redis.close()


@pytest.fixture
def gate(store: CounterStore) -> Gate:
    return Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), store, all_windows=True)


Door = Callable[[str], Awaitable[str]]


async def _library(gate: Gate, _: Any) -> Door:
    async def ask(path: str) -> str:
        return dict((await gate.check(Check.of(path, "GET", KEY, "203.0.113.7"))).headers)["ratelimit"]

    return ask


async def _check(gate: Gate, listen: Any) -> Door:
    url = await listen(DataPlane(gate, {}))

    async def ask(path: str) -> str:
        async with httpx.AsyncClient(base_url=url) as client:
            answer = await client.post("/v1/check", json={"path": path, "api_key": KEY})
            assert answer.json()["remaining"] == members(answer.headers["ratelimit"])[0][1]
            assert answer.headers["x-ratelimit-remaining"] == str(answer.json()["remaining"])
            assert {each.name for each in read_limit_headers(answer.headers).quotas} == {
                name for name, _ in members(answer.headers["ratelimit"])
            }
            return str(answer.headers["ratelimit"])

    return ask


async def _authorize(gate: Gate, listen: Any) -> Door:
    url = await listen(DataPlane(gate, {}))

    async def ask(path: str) -> str:
        async with httpx.AsyncClient(base_url=url) as client:
            answer = await client.get("/v1/authorize", headers={"X-Original-URI": path, "X-API-Key": KEY})
            assert answer.status_code == 204
            return str(answer.headers["ratelimit"])

    return ask


async def _holds(gate: Gate, listen: Any) -> Door:
    url = await listen(DataPlane(gate, {}))

    async def ask(path: str) -> str:
        async with httpx.AsyncClient(base_url=url) as client:
            answer = await client.post("/v1/holds", json={"path": path, "api_key": KEY, "cost": 1})
            assert answer.status_code == 200, answer.text
            return str(answer.headers["ratelimit"])

    return ask


async def _reserve(gate: Gate, listen: Any) -> Door:
    url = await listen(DataPlane(gate, {}))

    async def ask(path: str) -> str:
        async with httpx.AsyncClient(base_url=url) as client:
            answer = await client.post("/v1/reserve", json={"path": path, "api_key": KEY, "at_most_s": 0})
            assert answer.status_code == 200, answer.text
            return str(answer.headers["ratelimit"])

    return ask


async def _middleware(gate: Gate, _: Any) -> Door:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    transport = httpx.ASGITransport(app=RateLimitMiddleware(app, gate=gate))

    async def ask(path: str) -> str:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return str((await client.get(path, headers={"X-API-Key": KEY})).headers["ratelimit"])

    return ask


def _envoy(descriptors: int) -> Callable[[Gate, Any], Awaitable[Door]]:
    async def door(gate: Gate, _: Any) -> Door:
        service = RateLimitService(gate, EnvoySettings())

        async def ask(path: str) -> str:
            entries = [("path", path), ("method", "GET"), ("api_key", KEY)]
            others = [[("nothing", "here")]] * (descriptors - 1)
            answer = RateLimitResponse.FromString(await service.answer(request(entries, *others).SerializeToString()))
            return rls_headers(answer)["ratelimit"]

        return ask

    return door


DOORS: Final = {
    "library": _library,
    "check": _check,
    "authorize": _authorize,
    "holds": _holds,
    "reserve": _reserve,
    "middleware": _middleware,
    "envoy": _envoy(1),
    "envoy, two descriptors": _envoy(2),
}


@pytest.mark.parametrize("path", CASES)
@pytest.mark.parametrize("door", DOORS)
async def test_every_door_names_every_limit(
    door: str, path: str, gate: Gate, store: CounterStore, listen: Callable[..., Any]
) -> None:
    ask = await DOORS[door](gate, listen)
    for expected in CASES[path]:
        assert members(await ask(path)) == expected


async def test_a_denial_names_every_limit_that_which_denied_first(gate: Gate, listen: Callable[..., Any]) -> None:
    url = await listen(DataPlane(gate, {}))
    async with httpx.AsyncClient(base_url=url) as client:
        answers = [await client.post("/v1/check", json={"path": "/few", "api_key": KEY}) for _ in range(4)]
    assert answers[-1].status_code == 429
    assert members(answers[-1].headers["ratelimit"]) == [
        ("3/hour", 0),
        ("80/day", 77),
        ("tier 90/day", 87),
        ("quota 1000/month", 997),
    ]


async def test_limits_in_the_request(gate: Gate, listen: Callable[..., Any]) -> None:
    url = await listen(DataPlane(gate, {}))
    body = {"namespace": "emails", "subject": "user-42", "limits": ["5/minute", "40/day"]}
    async with httpx.AsyncClient(base_url=url) as client:
        answer = await client.post("/v1/limit", json=body)
    assert members(answer.headers["ratelimit"]) == [("5/minute", 4), ("40/day", 39)]


async def test_without_the_setting_there_is_one(store: CounterStore, listen: Callable[..., Any]) -> None:
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), store)
    url = await listen(DataPlane(gate, {}))
    async with httpx.AsyncClient(base_url=url) as client:
        for send in (
            client.post("/v1/check", json={"path": "/few", "api_key": KEY}),
            client.get("/v1/authorize", headers={"X-Original-URI": "/few", "X-API-Key": KEY}),
        ):
            assert len(members((await send).headers["ratelimit"])) == 1


async def test_the_middleware_with_a_policy() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    for wanted, expected in ((True, CASES["/few"][0]), (False, CASES["/few"][0][:1])):
        limited = RateLimitMiddleware(app, policy=parse_policy(POLICY), window_headers=wanted)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=limited), base_url="http://test") as client:
            answer = await client.get("/few", headers={"X-API-Key": KEY})
        assert members(answer.headers["ratelimit"]) == expected


def test_the_setting_switches_it_on(serve: Callable[..., Serve], tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(POLICY)
    server = serve(TIDEGATE_POLICY__FILE=str(tmp_path / "policy.toml"), TIDEGATE_SERVER__WINDOW_HEADERS="true")
    answer = httpx.post(f"{server.url}/v1/check", json={"path": "/few", "api_key": KEY})
    assert members(answer.headers["ratelimit"]) == CASES["/few"][0]
