"""Crossed thresholds on a real Redis: what the scripts report is what memory finds, on every way that a charge takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import Clock
from tests.integration.test_lua_twins import CLOCK_BY_ARGUMENT, HELD, KEYS, asked, limit_set
from tests.moments import until
from tests.servers.redis_server import RedisServer
from tests.servers.tcp_proxy import TcpProxy
from tidegate.breaker import BreakerOptions
from tidegate.counters import Charge, GrantingDecision, LeaseRequest
from tidegate.counters.crossings import Crossing, CrossingWatch
from tidegate.counters.degraded import GuardOptions
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.holds import HoldHandle
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.redis.scripts import parameters, script
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Decision
from tidegate.policy.limits import Algorithm, AnyAlgorithm, Limit, LimitSet, QuotaAlgorithm
from tidegate.policy.periods import PeriodAnchor
from tidegate.policy.quotas import CompiledQuotas, Overage, Quota

PERCENTS = (1, 50, 80, 100)
QUOTAS = CompiledQuotas((Quota.parse("9/day"), Quota.parse("30/month")), Overage(50), None, "pro").of(PeriodAnchor())


def _seen(found: list[Crossing]) -> list[tuple[Any, ...]]:
    return [(each.limits.name, each.limit.text, each.subject, each.percent, each.used) for each in found]


@given(
    st.sampled_from(list(Algorithm)),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 30_000_000), st.integers(0, 6)), min_size=1, max_size=15),
)
@settings(HELD, max_examples=60)
def test_lua_and_python_find_the_same(
    redis_server: RedisServer, algorithm: Algorithm, soft: bool, steps: list[tuple[int, int]]
) -> None:
    kinds: frozenset[AnyAlgorithm] = frozenset((algorithm, QuotaAlgorithm.QUOTA))
    work = script("charge", kinds, CLOCK_BY_ARGUMENT, watched=True)
    rule = LimitSet("rule", algorithm, [Limit.parse(text) for text in ("5/7s", "20/hour")], soft=soft)
    sets, keys, clock = [rule, QUOTAS], [f"twin:{next(KEYS)}", f"twin:{next(KEYS)}"], Clock()
    in_memory: list[Crossing] = []
    in_lua: list[Crossing] = []
    memory = MemoryCounters(clock=clock)
    memory.watch = CrossingWatch(lambda limits, limit: PERCENTS, in_memory.append)
    watch = CrossingWatch(lambda limits, limit: PERCENTS, in_lua.append)
    for advance, cost in steps:
        clock.now_us += advance
        given_parameters = [parameters(limits, clock.now_us, charging=True) for limits in sets]
        reply = asked(redis_server, work, keys, *given_parameters, cost, clock.now_us)
        decision = memory.charge_all(tuple((limits, "s") for limits in sets), cost)
        assert (reply[0] > 0, len(reply[5])) == (decision.allowed, 4)
        if reply[0] > 0 and cost:
            watch.note_all([(limits, "s") for limits in sets], reply[5], cost, clock.now_us)
        assert _seen(in_lua) == _seen(in_memory)


class Watched:
    """Counters on Redis, and the crossings that they found."""

    def __init__(self, url: str) -> None:
        self.found: list[Crossing] = []
        self.store = RedisCounters(url, 30)
        self.store.watch = CrossingWatch(
            lambda limits, limit: PERCENTS[1:] if limits.name != "unwatched" else (), self.found.append
        )


@pytest.fixture
async def watched(redis_server: RedisServer) -> AsyncIterator[Watched]:
    made = Watched(redis_server.url)
    yield made
    await made.store.close()


def _percents(found: list[Crossing], subject: str) -> list[tuple[int, int]]:
    return [(each.percent, each.used) for each in found if each.subject == subject]


async def test_single_charges_batches_and_denials(watched: Watched) -> None:
    store = watched.store
    ten, plain = limit_set(Algorithm.FIXED_WINDOW, ["10/day"], "ten"), limit_set(Algorithm.FIXED_WINDOW, ["2/day"], "unwatched")
    run = f"k:{next(KEYS)}-"
    await store.start()
    assert (await store.charge_one(Charge(((ten, run + "a"),), 5))).allowed
    assert not (await store.charge_one(Charge(((ten, run + "a"), (plain, run + "a")), 3))).allowed
    outcomes = await store.charge(
        [Charge(((ten, run + "a"), (plain, run + "a")), 1), Charge(((plain, run + "b"),), 2), Charge(((ten, run + "a"),), 4)]
    )
    assert [getattr(each, "allowed", None) for each in outcomes] == [True, True, True]
    assert _percents(watched.found, run + "a") == [(50, 5), (80, 10), (100, 10)]
    assert _percents(watched.found, run + "b") == []
    # Without a watch, the same counters go on, and nothing is reported.
    store.watch = None
    assert (await store.charge_one(Charge(((ten, run + "c"),), 10))).allowed
    assert (await store.charge([Charge(((ten, run + "d"),), 10), Charge(((ten, run + "d"),), 10)]))[0] is not None
    assert _percents(watched.found, run + "c") + _percents(watched.found, run + "d") == []


@pytest.mark.parametrize("algorithm", [Algorithm.FIXED_WINDOW, Algorithm.SLIDING_WINDOW, Algorithm.TOKEN_BUCKET])
async def test_leased_units_count_as_used(watched: Watched, algorithm: Algorithm) -> None:
    limits, subject = limit_set(algorithm, ["100/day"], f"leased {algorithm}"), f"k:{next(KEYS)}"
    await watched.store.start()
    decision = await watched.store.charge_one(Charge(((limits, subject),), 40, LeaseRequest(1000, 2, 5_000_000)))
    assert isinstance(decision, GrantingDecision)
    assert decision.granted == 30
    assert _percents(watched.found, subject) == [(50, 70)]
    # A lease takes half of what is left at most: never the last unit.
    decision = await watched.store.charge_one(Charge(((limits, subject),), 0, LeaseRequest(1000, 2, 5_000_000)))
    assert isinstance(decision, GrantingDecision)
    assert decision.granted == 15
    assert _percents(watched.found, subject) == [(50, 70), (80, 85)]


async def test_units_that_holds_reserve_count_as_used(watched: Watched) -> None:
    """As in memory: opening reports, whatever the hold costs in the end; a denied hold does not."""
    rule, tier = limit_set(Algorithm.TOKEN_BUCKET, ["100/day"], "rule"), limit_set(Algorithm.FIXED_WINDOW, ["200/day"], "tier")
    subject = f"k:{next(KEYS)}"
    counters = ((rule, subject), (QUOTAS, subject), (tier, subject))
    memory = MemoryCounters()
    in_memory: list[Crossing] = []
    memory.watch = CrossingWatch(lambda limits, limit: PERCENTS[1:], in_memory.append)
    for cost, settled in ((4, 1), (30, None), (6, 6), (0, 0), (2, 2)):
        decision, hold = await watched.store.open_hold(counters, cost, 60_000_000)
        twin, own = memory.open_hold_now(counters, cost, 60_000_000)
        assert (decision.allowed, hold is None) == (twin.allowed, own is None) == (settled is not None, settled is None)
        if hold is not None and own is not None and settled is not None:
            assert not (await watched.store.settle_hold(hold, settled)).repeated
            memory.settle_hold_now(own, settled)
    assert _seen(watched.found) == _seen(in_memory)
    assert [(each.percent, each.used) for each in watched.found] == [(50, 7), (80, 9), (100, 9)]
    # Once nobody watches, nothing is reported and holds go on.
    watched.store.watch = None
    _, hold = await watched.store.open_hold(counters, 3, 60_000_000)
    assert hold is not None
    assert len(watched.found) == 3


async def test_of_many_that_race_one_finds_each_crossing(redis_server: RedisServer) -> None:
    stores = [Watched(redis_server.url) for _ in range(3)]
    limits, subject = limit_set(Algorithm.SLIDING_WINDOW, ["50/day"], "race"), f"k:{next(KEYS)}"
    for each in stores:
        await each.store.start()
    charges = [each.store.charge_one(Charge(((limits, subject),))) for _ in range(25) for each in stores]
    decisions = await asyncio.gather(*charges)
    assert sum(decision.allowed for decision in decisions) == 50
    found = [crossing for each in stores for crossing in each.found]
    assert sorted(_percents(found, subject)) == [(50, 25), (80, 40), (100, 50)]
    for each in stores:
        await each.store.close()


@pytest.mark.parametrize("algorithm", [each for each in Algorithm if each is not Algorithm.LEAKY_BUCKET])
async def test_settlements_report_what_they_charge_beyond_the_reservation(
    redis_server: RedisServer, algorithm: Algorithm
) -> None:
    """At an instance that has never seen the limits, once, and as in memory."""
    opener, settler = Watched(redis_server.url), Watched(redis_server.url)
    rule, soft = LimitSet("rule", algorithm, [Limit.parse("20/day")], rule="a", tier="pro"), _soft("soft")
    subject = f"c:{next(KEYS)}"
    counters = ((rule, subject), (QUOTAS, subject), (soft, subject))
    memory = MemoryCounters()
    in_memory: list[Crossing] = []
    memory.watch = CrossingWatch(lambda limits, limit: PERCENTS[1:], in_memory.append)
    for cost, used in ((3, 1), (2, 9), (1, 30)):
        decision, hold = await opener.store.open_hold(counters, cost, 60_000_000)
        _, twin = memory.open_hold_now(counters, cost, 60_000_000)
        assert hold is not None
        assert twin is not None
        assert decision.allowed
        handle = HoldHandle.of(hold.text)
        for _ in range(2):
            await settler.store.settle_hold(handle, used)
            memory.settle_hold_now(twin, used)
    assert sorted(_seen(opener.found + settler.found)) == sorted(_seen(in_memory))
    assert {(each.limits.name, each.limit.text, each.percent) for each in settler.found} >= {
        ("quotas/", "9/day", 100),
        ("quotas/", "30/month", 100),
        ("rule", rule.limits[0].text, 100),
    }
    assert len({(each.limits.name, each.limit.text, each.percent) for each in settler.found}) == len(settler.found)
    await settler.store.close()
    await opener.store.close()


def _soft(name: str) -> LimitSet:
    return LimitSet(name, Algorithm.FIXED_WINDOW, [Limit.parse("2/day")], rule="b", tier="pro", soft=True)


async def test_adjustments_report_what_they_charge(watched: Watched) -> None:
    limits, subject = limit_set(Algorithm.SLIDING_WINDOW, ["10/day"], "ten"), f"k:{next(KEYS)}"
    for units in (4, 5, -8, 0, 12):
        await watched.store.adjust(((limits, subject),), units)
    assert _percents(watched.found, subject) == [(50, 9), (80, 9), (50, 10), (80, 10), (100, 10)]


@pytest.mark.parametrize(
    "algorithm", [Algorithm.FIXED_WINDOW, Algorithm.SLIDING_LOG, Algorithm.TOKEN_BUCKET, QuotaAlgorithm.QUOTA]
)
async def test_what_was_admitted_during_an_outage_is_reported_when_it_is_added(
    redis_server: RedisServer, algorithm: AnyAlgorithm
) -> None:
    """Two instances decide for themselves; the one whose addition reaches a threshold reports it, once."""
    limits = limit_set(algorithm, ["10/day"], f"debt {algorithm}") if isinstance(algorithm, Algorithm) else QUOTAS
    counter = (limits, f"c:{next(KEYS)}")
    found: list[Crossing] = []
    async with TcpProxy(redis_server.port) as proxy:
        guards = []
        for _ in range(2):
            store = RedisCounters(proxy.url, 5)
            store.watch = CrossingWatch(lambda limits, limit: PERCENTS[1:], found.append)
            guards.append(GuardedCounters(store, GuardOptions(breaker=BreakerOptions(failures=3, window_s=10, open_s=0.3))))
        for guard in guards:
            await guard.start()
            await guard.charge((Charge((counter,)),))
        proxy.refuse = True
        proxy.drop_all()
        for guard in guards:
            await until(lambda guard=guard: not guard.store.connections()[0].up)  # type: ignore[misc]
            for _ in range(3):
                (decision,) = await guard.charge((Charge((counter,)),))
                assert isinstance(decision, Decision)
                assert (decision.degraded, decision.allowed) == (True, True)
        assert found == []
        proxy.refuse = False
        for guard in guards:
            await until(lambda guard=guard: guard.put_back == 1 and not guard.owed)  # type: ignore[misc]
        text = limits.limits[0].text
        # The replies to the two additions may be read in either order.
        assert sorted((each.limit.text, each.percent, each.subject) for each in found) == [
            (text, percent, counter[1]) for percent in (50, 80)
        ]
        for guard in guards:
            await guard.close()
