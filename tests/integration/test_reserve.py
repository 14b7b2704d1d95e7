"""Reservations of two instances with one Redis, through both clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from tests.servers.redis_server import RedisServer
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.client import AsyncClient, Client, ReservedAnswer
from tidegate.counters.degraded import GuardOptions
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.leased import LeasedCounters
from tidegate.counters.redis.store import RedisCounters
from tidegate.counters.reservations import ReservationHandle
from tidegate.doors.http import DataPlane
from tidegate.errors import BadRequest, ReservationNotFound
from tidegate.gate.gate import Gate
from tidegate.policy.toml_reader import parse_policy

POLICY = """
[[tiers]]
name = "t"
  [[tiers.rules]]
  endpoint = "/fast"
  algorithm = "token_bucket"
  limits = ["200/second burst 1"]
  [[tiers.rules]]
  endpoint = "/slow"
  algorithm = "fixed_window"
  limits = ["1/hour", "5/day"]

[anonymous]
tier = "t"
"""
IP = "203.0.113.7"


@pytest.fixture
async def instances(redis_server: RedisServer, listen: Callable[..., Any]) -> AsyncIterator[list[tuple[str, GuardedCounters]]]:
    """Two, the second of which leases."""
    redis_server.must("FLUSHALL")
    made: list[tuple[str, GuardedCounters]] = []
    gates = []
    for leases in (False, True):
        guarded = GuardedCounters(RedisCounters(redis_server.url, timeout_s=10), GuardOptions())
        gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), LeasedCounters(guarded) if leases else guarded)
        gates.append(gate)
        made.append((await listen(DataPlane(gate, {})), guarded))
    yield made
    for gate in gates:
        await gate.close()


async def test_callers_of_two_instances_go_in_the_order_of_asking(instances: list[tuple[str, GuardedCounters]]) -> None:
    clients = [AsyncClient(url, deadline_s=30) for url, _ in instances]
    assert all([(await each.wait("/fast", ip="203.0.113.8", at_most_s=30)).allowed for each in clients])
    calls = sum(store.store_calls for _, store in instances)
    asked: list[ReservedAnswer] = []
    for number in range(20):
        place = await clients[number % 2].reserve("/fast", ip=IP, at_most_s=600)
        assert isinstance(place, ReservedAnswer)
        asked.append(place)
    moments = [ReservationHandle.of(each.reservation).at_us for each in asked if each.reservation is not None]
    assert moments == sorted(set(moments)), "each after the one before, whichever instance gave it"
    assert sum(store.store_calls for _, store in instances) - calls == 20, "one call for each place"
    went: list[int] = []

    async def job(number: int) -> None:
        assert (await clients[number % 2].wait("/fast", ip=IP, at_most_s=600)).allowed
        went.append(number)

    await asyncio.gather(*map(job, range(10)))
    assert sorted(went) == list(range(10))
    for each in clients:
        await each.close()


async def test_another_instance_takes_a_place_back_once(
    instances: list[tuple[str, GuardedCounters]], redis_server: RedisServer
) -> None:
    (one, _), (other, _) = instances

    def blocking() -> None:
        with Client(one, deadline_s=30) as here, Client(other, deadline_s=30) as there:

            def reserve(client: Client, subject: str = IP) -> ReservedAnswer:
                place = client.reserve("/slow", ip=subject, at_most_s=3600)
                assert isinstance(place, ReservedAnswer)
                return place

            assert reserve(here).wait_s == 0
            place = reserve(here)
            assert place.allowed
            assert place.reservation is not None
            assert 0 < place.wait_s <= 3600
            denied = reserve(there)
            assert not denied.allowed, "the next window begins after more than an hour"
            assert denied.retry_after is not None
            for client in (there, here, there):
                assert client.cancel(place.reservation)
            again = reserve(there)
            assert again.allowed
            assert not reserve(here).allowed, "given back once"
            assert again.reservation is not None
            changed = msgspec.structs.replace(ReservationHandle.of(again.reservation), cost=2)
            with pytest.raises(ReservationNotFound):
                there.cancel(changed.text)
            with pytest.raises(BadRequest, match="is not an id"):
                there.cancel("AAAA")
            redis_server.must("FLUSHALL")
            with pytest.raises(ReservationNotFound, match="lost its data"):
                here.cancel(again.reservation)
            first = here.reserve_limit("partner", "all", "1/hour", algorithm="token_bucket", at_most_s=0)
            assert (first.allowed, first.rule) == (True, "partner")
            assert not there.wait_limit("partner", "all", "1/hour", algorithm="token_bucket", at_most_s=1).allowed

    await asyncio.to_thread(blocking)


async def test_what_is_remembered_ends_with_the_moment(
    instances: list[tuple[str, GuardedCounters]], redis_server: RedisServer
) -> None:
    async with AsyncClient(instances[0][0], deadline_s=30) as client:
        await client.reserve("/slow", ip=IP, at_most_s=3600)
        place = await client.reserve("/slow", ip=IP, at_most_s=3600)
        assert isinstance(place, ReservedAnswer)
        keys = redis_server.must("KEYS", "*.reserved")
        assert len(keys) == 1
        assert 0 < redis_server.must("PTTL", keys[0]) <= place.wait_s * 1000 + 1
        waiting = asyncio.ensure_future(client.wait("/slow", ip="203.0.113.8", at_most_s=3600))
        assert (await waiting).allowed
        waiting = asyncio.ensure_future(client.wait("/slow", ip="203.0.113.8", at_most_s=3600))
        while len(redis_server.must("KEYS", "*.reserved")) < 2:
            await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (await client.reserve("/slow", ip="203.0.113.8", at_most_s=3600)).allowed, "its place was given back"
