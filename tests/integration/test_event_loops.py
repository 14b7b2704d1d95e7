"""The library on one event loop after the other, as `asyncio.run` and Starlette's TestClient make them, with Redis."""

from __future__ import annotations

import asyncio
import secrets
import threading
import warnings
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from tests.moments import until
from tidegate import Gate, Limiter, RateLimitMiddleware
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.factory import open_counters
from tidegate.counters.guarded import GuardedCounters
from tidegate.decision import Check
from tidegate.policy.toml_reader import parse_policy
from tidegate.settings import CounterSettings

with warnings.catch_warnings():
    # Starlette 1.x prefers a successor of httpx.
    warnings.simplefilter("ignore")
    from starlette.testclient import TestClient

KEY = "policy-file-key-0001"


def policy(tier: str) -> str:
    return f"""\
[[tiers]]
name = "{tier}"
  [[tiers.rules]]
  endpoint = "/a"
  limits = ["5/day"]
[anonymous]
tier = "{tier}"
[[api_keys]]
key = "{KEY}"
tier = "{tier}"
"""


@pytest.fixture(params=["redis_server", "redis_cluster"])
def store(request: pytest.FixtureRequest) -> GuardedCounters:
    url = request.getfixturevalue(request.param).url
    made = open_counters(CounterSettings(url=url, timeout_ms=20_000, on_failure="deny"))
    assert isinstance(made, GuardedCounters)
    return made


def app_of(counters: Any, tier: str) -> Starlette:
    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("passed")

    limited = Middleware(RateLimitMiddleware, policy=parse_policy(policy(tier)), counters=counters)
    return Starlette(routes=[Route("/a", answer)], middleware=[limited])


def test_asyncio_run_again_and_again(store: GuardedCounters) -> None:
    limiter = Limiter("5/day", counters=store, name=secrets.token_hex(8))
    left = []
    for _ in range(3):
        left.append(asyncio.run(limiter.check("user")).remaining)
        many = asyncio.run(limiter.check_many([("other", 0), ("user", 0)]))
        assert [getattr(each, "remaining", each) for each in many] == [5, left[-1]]
    assert left == [4, 3, 2]
    asyncio.run(limiter.reset("user"))

    async def last() -> None:
        async with limiter:
            assert (await limiter.check("user")).remaining == 4

    asyncio.run(last())


def test_what_is_left_of_a_loop_that_ended(store: GuardedCounters) -> None:
    """Its connections are closed with it, and no thread or socket stays."""
    limiter = Limiter("5/day", counters=store, name=secrets.token_hex(8))
    seen: list[Any] = []

    async def look() -> None:
        await limiter.check("user")
        seen.append([connection._transport for connection in store.store.connections()])

    before = threading.active_count()
    asyncio.run(look())
    assert all(transport.is_closing() for transport in seen[0])
    asyncio.run(limiter.close())
    assert threading.active_count() <= before + 1


def test_two_loops_in_turn(store: GuardedCounters) -> None:
    """Neither is closed between: what is used in one is let go in the other."""
    limiter = Limiter("50/day", counters=store, name=secrets.token_hex(8))
    loops = [asyncio.new_event_loop() for _ in range(2)]
    left = [loop.run_until_complete(limiter.check("user")).remaining for _ in range(3) for loop in loops]
    assert left == [49, 48, 47, 46, 45, 44]
    loops[1].run_until_complete(limiter.close())
    for loop in loops:
        loop.run_until_complete(_rest())
        loop.close()


async def _rest() -> None:
    """What was left to be closed in this loop is closed by itself."""
    mine = asyncio.current_task()
    await until(lambda: asyncio.all_tasks() <= {mine})


def test_a_check_client_without_a_lifespan(store: GuardedCounters) -> None:
    client = TestClient(app_of(store, secrets.token_hex(8)))
    answers = [client.get("/a", headers={"X-API-Key": KEY}) for _ in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429], answers[0].text
    # Its peer is no address: all requests without a key are one client.
    answers = [client.get("/a") for _ in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429], answers[0].text


def test_the_lifespan_closes_a_store_of_the_middleware_s_own(redis_server: Any) -> None:
    app = app_of(redis_server.url, secrets.token_hex(8))
    for expected in ([4, 3], [2, 1]):
        with TestClient(app) as client:
            left = [int(client.get("/a", headers={"X-API-Key": KEY}).headers["x-ratelimit-remaining"]) for _ in range(2)]
            assert left == expected
            counters: Any = _gate(app).counters
            store = counters.guarded.store
            assert store.connections()
        assert not store.connections(), "the lifespan's shutdown closed it"


def test_a_store_that_was_handed_over_stays_open(redis_server: Any) -> None:
    store = open_counters(redis_server.url)
    with TestClient(app_of(store, secrets.token_hex(8))) as client:
        assert client.get("/a", headers={"X-API-Key": KEY}).status_code == 200
    assert isinstance(store, GuardedCounters)
    assert store.store.connections()
    asyncio.run(store.close())


async def test_a_gate_closes_its_store(redis_server: Any) -> None:
    store = open_counters(redis_server.url)
    assert isinstance(store, GuardedCounters)
    async with Gate(CachedCatalog(PolicyCatalog(parse_policy(policy("t")))), store) as gate:
        await gate.check(Check.of("/a", api_key=KEY))
        await until(lambda: bool(store.store.connections()))
    assert not store.store.connections()


def _gate(app: Starlette) -> Gate:
    layer: Any = app.middleware_stack
    while not isinstance(layer, RateLimitMiddleware):
        layer = layer.app
    return layer.gate
