"""What instances report of themselves through Redis, for the console."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import pytest

from tests.moments import PATIENCE_S
from tests.servers.redis_server import RedisServer
from tidegate.counters.redis import instances
from tidegate.counters.redis.instances import InstanceState, InstanceStates
from tidegate.counters.redis.store import RedisCounters

KEY = "tg:{instances}states"


def state(name: str, catalog_version: int = 3) -> InstanceState:
    return InstanceState(name, "127.0.0.1:8080", "1.0", catalog_version, "2026-11-30T00:00:00Z")


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[RedisCounters]:
    redis_server.must("DEL", KEY)
    made = RedisCounters(redis_server.url, PATIENCE_S)
    await made.start()
    yield made
    await made.close()


async def test_each_instance_reads_the_states_of_all(store: RedisCounters) -> None:
    versions = {"a": 3, "b": 3}
    a, b = (InstanceStates(store, lambda name=name: state(name, versions[name])) for name in versions)  # type: ignore[misc]
    await a.exchange()
    assert a.known == (state("a"),)
    versions["b"] = 2
    await b.exchange()
    await a.exchange()
    assert a.known == b.known == (state("a"), state("b", 2))
    await b.leave()
    await a.exchange()
    assert a.known == (state("a"),)


async def test_what_others_wrote_there_is_replaced_or_left_out(store: RedisCounters, redis_server: RedisServer) -> None:
    a = InstanceStates(store, lambda: state("a"))
    now_s = int(redis_server.must("TIME")[0])
    strange = {
        "b": {"at": now_s, "state": msgspec.json.encode(state("b")).decode()},
        "gone": {"at": now_s - 1000, "state": msgspec.json.encode(state("gone")).decode()},
        "c": {"at": now_s, "state": msgspec.json.encode(state("another")).decode()},
        "d": {"at": now_s, "state": "[]"},
        "e": {"at": "soon", "state": ""},
        "f": 7,
    }
    for text in ("{", "[1]", "7", "", msgspec.json.encode(strange).decode()):
        redis_server.must("SET", KEY, text)
        await a.exchange()
    assert a.known == (state("a"), state("b"))
    redis_server.must("DEL", KEY)
    redis_server.must("HSET", KEY, "x", "y")
    await a.exchange()
    assert a.known == (state("a"),)
    assert 0 < int(redis_server.must("TTL", KEY)) <= instances.EXPIRY_S


async def test_the_number_of_instances_is_bounded(store: RedisCounters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "MAX_INSTANCES", 2)
    for name in ("a", "b", "c"):
        last = InstanceStates(store, lambda name=name: state(name))  # type: ignore[misc]
        await last.exchange()
    assert len(last.known) == 2
    assert state("c") in last.known
