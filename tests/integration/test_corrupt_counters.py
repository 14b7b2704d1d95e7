"""A counter that no script can read costs its own subject what it had counted, and nobody else anything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.moments import until
from tests.servers.redis_cluster import RedisCluster
from tests.servers.redis_server import Client, RedisServer
from tidegate.counters import Charge
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.redis.keyspace import key_of
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Decision
from tidegate.policy.limits import Algorithm, Limit, LimitSet

NAMES = iter(range(1_000_000))
TIMEOUT_S = 5.0
DAMAGE: dict[str, list[tuple[Any, ...]]] = {
    "a set": [("SADD", "member")],
    "a list": [("RPUSH", b"x")],
    "cut short": [("SET", b"\xdc\xff\xff")],
    "of text": [("SET", b"\x3c\xa1a\xa1b\xa1c\xa1d")],
    "no entries": [("RPUSH", b"\x01\x3c\x05\x00", b"\xc1")],
}


@pytest.fixture
async def store(any_redis: RedisServer) -> AsyncIterator[tuple[RedisServer, GuardedCounters]]:
    counters = GuardedCounters(RedisCounters(any_redis.url, TIMEOUT_S))
    await counters.start()
    yield any_redis, counters
    await counters.close()


def limit_set(algorithm: Algorithm = Algorithm.FIXED_WINDOW) -> LimitSet:
    return LimitSet(f"corrupt:{next(NAMES)}", algorithm, [Limit.parse("5/minute burst 5" if algorithm.is_bucket else "5/minute")])


async def decided(counters: GuardedCounters, *charges: Charge) -> list[Decision]:
    outcomes = await counters.charge(charges)
    assert all(isinstance(outcome, Decision) and not outcome.degraded for outcome in outcomes), outcomes
    return [outcome for outcome in outcomes if isinstance(outcome, Decision)]


def damage(server: RedisServer | Client, key: bytes, kind: str) -> None:
    server.call("DEL", key)
    for command, *values in DAMAGE[kind]:
        server.call(command, key, *values)


@pytest.mark.parametrize("algorithm", Algorithm)
async def test_what_no_script_can_read_is_reset(store: tuple[RedisServer, GuardedCounters], algorithm: Algorithm) -> None:
    server, counters = store
    for kind in DAMAGE:
        limits = limit_set(algorithm)
        damage(server, key_of(limits, "s"), kind)
        answers = [(await decided(counters, Charge(((limits, "s"),))))[0] for _ in range(6)]
        assert [answer.allowed for answer in answers] == [True] * 5 + [False], kind
    assert counters.store.corrupt.resets >= 2
    assert not counters.breakers


async def test_the_other_counters_of_a_check_and_of_a_batch_keep_what_they_counted(
    store: tuple[RedisServer, GuardedCounters],
) -> None:
    server, counters = store
    rule, tier = limit_set(), limit_set()
    await decided(counters, *(Charge(((rule, f"s{number}"), (tier, f"s{number}"))) for number in range(60)))
    for number in (7, 55):
        damage(server, key_of(rule, f"s{number}"), "a set")
    answers = await decided(counters, *(Charge(((rule, f"s{number}"), (tier, f"s{number}"))) for number in range(60)))
    assert all(answer.allowed for answer in answers)
    looks = await decided(counters, *(Charge(((limits, f"s{number}"),), 0) for limits in (rule, tier) for number in range(60)))
    expected = [4 if number in (7, 55) else 3 for number in range(60)] + [3] * 60
    assert [look.remaining for look in looks] == expected
    assert counters.store.corrupt.resets == 2
    assert not counters.breakers


async def test_many_checks_at_once_reset_it_once(store: tuple[RedisServer, GuardedCounters]) -> None:
    server, counters = store
    limits = limit_set()
    damage(server, key_of(limits, "s"), "a set")
    answers = await asyncio.gather(*(decided(counters, Charge(((limits, "s"),))) for _ in range(40)))
    assert sum(answer.allowed for each in answers for answer in each) == 5
    assert counters.store.corrupt.resets == 1


async def test_a_debt_to_a_corrupt_counter_does_not_hold_up_the_others(store: tuple[RedisServer, GuardedCounters]) -> None:
    server, counters = store
    sets = [limit_set(algorithm) for algorithm in Algorithm]
    for limits in sets:
        counters._local.owe(Charge(((limits, "s"),), 2), counters._store_now_us())
        damage(server, key_of(limits, "s"), "a set")
    healthy = limit_set()
    counters._local.owe(Charge(((healthy, "s"),), 2), counters._store_now_us())
    await until(lambda: counters.put_back == 6)
    for limits in (*sets, healthy):
        assert (await decided(counters, Charge(((limits, "s"),), 0)))[0].remaining == 3


async def test_a_corrupt_list_of_instances_is_reset(store: tuple[RedisServer, GuardedCounters]) -> None:
    server, counters = store
    await until(lambda: server.call("ZCARD", "tg:{instances}") == 1)
    for key in ("tg:{instances}", "tg:{instances}resets"):
        server.must("DEL", key)
        server.must("HSET", key, "a", "b")
    await until(
        lambda: server.call("TYPE", "tg:{instances}") == b"zset" and server.call("TYPE", "tg:{instances}resets") != b"hash"
    )
    assert not counters.breakers


async def test_a_script_that_fails_for_a_missing_permission_resets_nothing(any_redis: RedisServer) -> None:
    any_redis.must("ACL", "SETUSER", "no-time", "reset", "on", ">pw", "~*", "&*", "+@all", "-time")
    counters = GuardedCounters(RedisCounters(any_redis.url.replace("redis://", "redis://no-time:pw@"), TIMEOUT_S))
    await counters.start()
    limits = limit_set()
    any_redis.must("SET", key_of(limits, "s"), b"whatever")
    outcome = (await counters.charge([Charge(((limits, "s"),))]))[0]
    assert isinstance(outcome, Decision)
    assert outcome.degraded
    assert counters.degraded == {"script": 1}
    assert any_redis.must("EXISTS", key_of(limits, "s")) == 1
    assert counters.store.corrupt.resets == 0
    await counters.close()
    any_redis.must("ACL", "DELUSER", "no-time")


async def test_in_a_cluster_too(redis_cluster: RedisCluster) -> None:
    counters = GuardedCounters(RedisCounters(redis_cluster.url, TIMEOUT_S))
    await counters.start()
    limits = limit_set()
    for number in range(20):
        key = key_of(limits, f"s{number}")
        damage(redis_cluster.owner_of(redis_cluster.slot_of(key.decode())), key, "a set")
    answers = await decided(counters, *(Charge(((limits, f"s{number}"),)) for number in range(20)))
    assert [answer.remaining for answer in answers] == [4] * 20
    assert counters.store.corrupt.resets == 20
    assert not counters.breakers
    await counters.close()
