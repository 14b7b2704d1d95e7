"""Checks whose counters lie on several shards of a cluster."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from tests.moments import until
from tests.servers.redis_cluster import RedisCluster
from tidegate.counters import Charge
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.redis.keyspace import hash_tag, slot_of
from tidegate.counters.redis.store import RedisCounters
from tidegate.counters.reservations import ReservedCounter
from tidegate.decision import Decision
from tidegate.errors import ReservationNotFound, StoreUnavailable
from tidegate.policy.limits import Algorithm, Limit, LimitSet

NAMES = iter(range(1_000_000))
TIMEOUT_S = 5.0


def limit_set(text: str, algorithm: Algorithm = Algorithm.FIXED_WINDOW) -> LimitSet:
    return LimitSet(f"split:{next(NAMES)}", algorithm, [Limit.parse(text)])


def subjects() -> tuple[str, str]:
    """Two of different shards."""
    first = f"a{next(NAMES)}"
    return first, next(f"b{n}" for n in range(10_000) if (slot_of(f"b{n}") < 5000) != (slot_of(first) < 5000))


async def decided(counters: GuardedCounters, *pairs: tuple[LimitSet, str], cost: int = 1) -> Decision:
    outcome = (await counters.charge([Charge(pairs, cost)]))[0]
    assert isinstance(outcome, Decision), outcome
    assert not outcome.degraded
    return outcome


async def test_a_rejection_of_one_shard_charges_and_holds_up_nobody_on_the_other(redis_cluster: RedisCluster) -> None:
    counters = GuardedCounters(RedisCounters(redis_cluster.url, TIMEOUT_S))
    await counters.start()
    ip, key = subjects()
    rule, tier = limit_set("2/day"), limit_set("1/day")
    assert (await decided(counters, (rule, ip), (tier, key))).allowed
    denied = await decided(counters, (rule, ip), (tier, key))
    assert (denied.allowed, denied.binding, denied.limits) == (False, tier.limits[0], rule)
    assert (denied.retry_after_us or 0) > 0
    # Nothing was held for a moment, so nothing had to be given back.
    assert counters.store.refunds == 0
    assert (await decided(counters, (rule, ip), cost=0)).remaining == 1
    assert (await decided(counters, (rule, ip))).allowed
    await counters.close()


async def test_many_at_once_admit_exactly_what_both_hold(redis_cluster: RedisCluster) -> None:
    counters = GuardedCounters(RedisCounters(redis_cluster.url, TIMEOUT_S))
    await counters.start()
    for algorithm in Algorithm:
        ip, key = subjects()
        burst = " burst 5" if algorithm.is_bucket else ""
        rule, tier = limit_set("50/day burst 50" if burst else "50/day", algorithm), limit_set(f"5/day{burst}", algorithm)
        answers = await asyncio.gather(*(decided(counters, (rule, ip), (tier, key)) for _ in range(40)))
        assert sum(answer.allowed for answer in answers) <= 5
        await until(lambda: not counters.store._splits)
        left = (await decided(counters, (rule, ip), cost=0)).remaining
        assert left == 50 - sum(answer.allowed for answer in answers), "what the tier refused was given back"
    await counters.close()


async def test_denials_are_forgotten_everywhere_after_a_refund(redis_cluster: RedisCluster) -> None:
    stores = [GuardedCounters(RedisCounters(redis_cluster.url, TIMEOUT_S)) for _ in range(2)]
    for counters in stores:
        await counters.start()
    await until(lambda: all(counters._resets is not None for counters in stores))
    limits, subject = limit_set("1/day"), subjects()[0]
    assert (await decided(stores[0], (limits, subject))).allowed
    for counters in stores:
        assert not (await decided(counters, (limits, subject))).allowed
        assert len(counters.denials) == 1
    stores[0].store.refunds += 1
    await until(lambda: not any(len(counters.denials) for counters in stores))
    for counters in stores:
        await counters.close()


async def test_a_failure_is_charged_to_the_shard_that_was_called(redis_cluster: RedisCluster) -> None:
    counters = GuardedCounters(RedisCounters(redis_cluster.url, TIMEOUT_S))
    await counters.start()
    ip, key = subjects()
    limits = limit_set("5/day")
    error = StoreUnavailable("it was lost", reason="disconnected", event=1, shard=counters.store.shard_of(ip))
    # By the time it fails, another server counts the subject.
    counters._failed(Charge(((limits, key),)), error, 0)
    assert set(counters.breakers) == {counters.store.shard_of(ip)}
    await counters.close()


async def test_a_reservation_on_several_shards_is_left_to_a_check(redis_cluster: RedisCluster) -> None:
    counters = GuardedCounters(RedisCounters(redis_cluster.url, TIMEOUT_S))
    await counters.start()
    ip, key = subjects()
    rule, tier = limit_set("1/day"), limit_set("1/day")
    assert await counters.reserve_named(((rule, ip), (tier, key)), 1, 0) is None, "no order, and nothing charged"
    assert (await decided(counters, (rule, ip), (tier, key))).allowed
    placed = await counters.reserve_named(((rule, ip),), 1, 100_000_000_000)
    assert placed is not None
    assert placed[1] is not None
    forged = msgspec.structs.replace(placed[1], counters=(*placed[1].counters, ReservedCounter(hash_tag(key), b"AAAAAAAA", b"")))
    with pytest.raises(ReservationNotFound):
        await counters.release_named(forged)
    assert await counters.release_named(placed[1])
    await counters.close()
