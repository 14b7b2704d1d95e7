"""Leases on a real Redis: exact among processes; dropped, given back and used while it is away."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.moments import PATIENCE_S, until
from tests.servers.redis_server import RedisServer
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters import Charge
from tidegate.counters.degraded import GuardOptions
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.holds import HoldHandle
from tidegate.counters.leased import LeasedCounters
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Check, Decision
from tidegate.gate.gate import Gate
from tidegate.ledger.aggregate import UsageCounts
from tidegate.ledger.buffer import Buffer
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.policy.toml_reader import parse_policy

PROCESSES = 5
LEASED = [algorithm for algorithm in Algorithm if algorithm is not Algorithm.SLIDING_LOG]
NAMES = iter(range(1_000_000))


@pytest.mark.parametrize("topology", ["redis_server", "redis_cluster", "redis_sentinel"])
def test_processes_admit_exactly_the_limit(request: pytest.FixtureRequest, topology: str) -> None:
    """Five processes of 64 concurrent checks ask for twice the limit: of all algorithms, limits of 1, 5, 100 and 10,000."""
    server: Any = request.getfixturevalue(topology)
    amounts, count = ((1, 5, 100, 10_000), PROCESSES) if topology == "redis_server" else ((5, 2_000), 2)
    cases = []
    for algorithm in LEASED:
        for amount in amounts:
            limit = f"{amount}/366d" + (f" burst {amount}" if algorithm.is_bucket else "")
            cases.append((algorithm, f"processes:{next(NAMES)}", amount, limit))
    texts = ["|".join(map(str, (algorithm.value, *rest))) for algorithm, *rest in cases]
    command = [sys.executable, "-m", "tests.lease_process", server.url, str(count), *texts]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    for place, (algorithm, _, amount, limit) in enumerate(cases):
        allowed, degraded, calls = (sum(each[place][number] for each in said) for number in range(3))
        assert degraded == 0
        assert allowed <= amount, (algorithm, limit)
        assert allowed >= amount * (95 if algorithm.is_bucket else 99) // 100, (algorithm, limit)
        if amount >= 2_000:
            assert calls < amount, "most checks are decided from leases"


def limit_set(text: str, algorithm: Algorithm = Algorithm.FIXED_WINDOW) -> LimitSet:
    return LimitSet(f"leases:{next(NAMES)}", algorithm, [Limit.parse(text)], rule="r", tier="t")


def leased(server: RedisServer, timeout_s: float = 20.0, ttl_s: float = 5.0) -> LeasedCounters:
    return LeasedCounters(GuardedCounters(RedisCounters(server.url, timeout_s), GuardOptions()), ttl_s)


async def ask(store: LeasedCounters, limits: LimitSet, times: int = 1, cost: int = 1, subject: str = "s") -> Decision:
    for _ in range(times):
        [outcome] = await store.charge([Charge(((limits, subject),), cost)])
        assert isinstance(outcome, Decision)
    return outcome


async def lease(store: LeasedCounters, limits: LimitSet) -> None:
    """Check eight times, so that the subject is leased; the script for it is loaded before."""
    await ready(store, limits)
    await ask(store, limits, 8)


async def ask_until_leased(store: LeasedCounters, limits: LimitSet) -> None:
    """Check until units are leased: on a busy machine a lease may be idle, and given back, before it is looked at."""
    deadline = time.monotonic() + PATIENCE_S
    while not store.table.units:
        assert time.monotonic() < deadline
        await ask(store, limits)


async def ready(store: LeasedCounters, limits: LimitSet) -> None:
    """Until the other instances are known and the script is loaded."""
    deadline = time.monotonic() + PATIENCE_S
    while not store.store.grants(((limits, "s"),)):
        assert time.monotonic() < deadline
        await ask(store, limits, subject="warm")


async def left(store: LeasedCounters, limits: LimitSet) -> int | None:
    """What remains, by the store alone."""
    [outcome] = await store.store.charge([Charge(((limits, "s"),), 0)])
    assert isinstance(outcome, Decision)
    return outcome.remaining


@pytest.fixture
async def stores(redis_server: RedisServer) -> AsyncIterator[tuple[LeasedCounters, LeasedCounters]]:
    both = leased(redis_server), leased(redis_server)
    yield both
    for each in both:
        await each.close()


async def test_what_a_caller_reads_is_what_it_has(stores: tuple[LeasedCounters, LeasedCounters]) -> None:
    store, limits = stores[0], limit_set("1000/day")
    await ready(store, limits)
    for used in range(1, 40):
        assert (await ask(store, limits)).remaining == 1000 - used
    assert store.table.decisions > 20
    assert (await ask(store, limits, cost=0)).remaining == 961
    [windows] = await store.windows([(limits, "s")])
    assert windows is not None
    assert windows[0].remaining == 961
    assert (await left(store, limits) or 0) < 961


async def test_a_subject_seen_once_and_a_log_are_not_leased(stores: tuple[LeasedCounters, LeasedCounters]) -> None:
    store, once, log = stores[0], limit_set("1000/day"), limit_set("1000/day", Algorithm.SLIDING_LOG)
    await ask(store, once)
    await ask(store, log, 20)
    assert not store.table.leases
    assert store.table.decisions == 0


@pytest.mark.parametrize("algorithm", LEASED)
async def test_after_the_last_unit_a_denial_needs_no_call(redis_server: RedisServer, algorithm: Algorithm) -> None:
    limits = limit_set("20/366d burst 20" if algorithm.is_bucket else "20/366d", algorithm)
    store = leased(redis_server)
    await ready(store, limits)
    decision = await ask(store, limits)
    while decision.remaining:
        decision = await ask(store, limits)
    assert decision.allowed
    calls = store.store.store_calls
    assert not (await ask(store, limits, 5)).allowed
    assert store.store.store_calls == calls
    await store.close()


async def test_many_leases_come_back_in_one_call(redis_server: RedisServer) -> None:
    limits = limit_set("1000/366d")
    store = leased(redis_server)
    await ready(store, limits)
    for number in range(40):
        await ask(store, limits, 3, subject=f"s{number}")
    before = store.store.store.return_calls
    assert len(store.table.leases) == 40
    await store.give_back()
    assert store.store.store.return_calls == before + 1
    assert store.table.units == store.table.lost == 0
    for number in range(40):
        assert (await ask(store, limits, cost=0, subject=f"s{number}")).remaining == 997
    await store.close()


@pytest.mark.parametrize("algorithm", LEASED)
async def test_units_come_back_when_an_instance_ends(
    stores: tuple[LeasedCounters, LeasedCounters], redis_server: RedisServer, algorithm: Algorithm
) -> None:
    limits = limit_set("1000/366d burst 1000" if algorithm.is_bucket else "1000/366d", algorithm)
    ending = leased(redis_server)
    await lease(ending, limits)
    assert ending.table.units > 0
    await ending.close()
    assert await left_of(stores[0], limits) == 992
    assert ending.table.lost == 0


async def left_of(store: LeasedCounters, limits: LimitSet) -> int | None:
    return (await ask(store, limits, cost=0)).remaining


async def test_units_that_are_not_used_come_back(stores: tuple[LeasedCounters, LeasedCounters]) -> None:
    store, limits = stores[0], limit_set("1000/day")
    await lease(store, limits)
    assert await left(store, limits) != 992
    await until(lambda: not store.table.leases and not store.table.returns, PATIENCE_S)
    deadline = time.monotonic() + PATIENCE_S
    while await left(store, limits) != 992:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_a_reset_ends_the_leases_of_every_instance(stores: tuple[LeasedCounters, LeasedCounters]) -> None:
    one, other = stores
    limits, others = limit_set("1000/day"), limit_set("1000/day")
    await lease(one, limits)
    await lease(other, limits)
    await lease(other, others)
    await one.reset([(limits, "s")])
    assert not one.table.leases
    await until(lambda: not other.table.leases, PATIENCE_S)
    deadline = time.monotonic() + PATIENCE_S
    while await left(one, others) != 992:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    # What was leased before the reset is not subtracted from what is counted after it.
    assert await left(one, limits) == 1000


async def test_a_changed_limit_gives_back_at_once(stores: tuple[LeasedCounters, LeasedCounters]) -> None:
    store, limits = stores[0], limit_set("1000/day")
    await lease(store, limits)
    lowered = LimitSet(limits.name, limits.algorithm, [Limit.parse("100/day")], tier="t")
    store.drop(lambda each, _: each.tier == "t")
    assert not store.table.leases
    deadline = time.monotonic() + PATIENCE_S
    while await left(store, lowered) != 92:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_a_denial_is_not_remembered_for_longer_than_others_may_give_back(
    redis_server: RedisServer,
) -> None:
    limits = limit_set("40/366d")
    one, other = leased(redis_server, ttl_s=20.0), leased(redis_server, ttl_s=0.5)
    try:
        await lease(one, limits)
        while not one.table.units:
            await ask(one, limits)
        while (await ask(other, limits)).allowed:
            pass
        assert one.table.units > 0
        one.drop()
        deadline = time.monotonic() + PATIENCE_S
        while not (await ask(other, limits)).allowed:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
    finally:
        await one.close()
        await other.close()


async def test_leases_decide_while_redis_is_away_and_are_not_counted_twice(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    store = leased(server, 0.2)
    try:
        limits = limit_set("1000/day")
        await lease(store, limits)
        units = store.table.units
        assert units > 1
        before = await left(store, limits)
        server.pause()
        for _ in range(units):
            assert not (await ask(store, limits)).degraded
        assert (await ask(store, limits)).degraded
        server.resume()
        deadline = time.monotonic() + PATIENCE_S
        guarded = store.store
        assert isinstance(guarded, GuardedCounters)
        while (await ask(store, limits, cost=0)).degraded or guarded.owed or len(guarded.late):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        # One check was admitted without the store, charged late or put back; those that were leased are not charged again.
        assert before is not None
        assert before - 3 <= (await left(store, limits) or 0) + store.table.units <= before
    finally:
        await store.close()


async def test_the_table_is_bounded(redis_server: RedisServer) -> None:
    store = LeasedCounters(GuardedCounters(RedisCounters(redis_server.url, 20.0)), max_subjects=3)
    try:
        limits = limit_set("1000/day")
        await lease(store, limits)
        for subject in "abcdef":
            await ask(store, limits, 8, subject=subject)
        assert len(store.table.leases) == 3, "as many as are allowed"
    finally:
        await store.close()


@pytest.mark.parametrize("algorithm", LEASED)
async def test_leases_and_holds_of_one_counter_stay_within_the_limit(
    stores: tuple[LeasedCounters, LeasedCounters], algorithm: Algorithm
) -> None:
    """Checks, holds and their settlements on two instances in turn, until both deny; what was used is the limit at most."""
    limits = limit_set("200/366d burst 200" if algorithm.is_bucket else "200/366d", algorithm)
    counters = ((limits, "s"),)
    used = held = 0
    handles: list[tuple[LeasedCounters, HoldHandle]] = []
    for store in stores:
        await ready(store, limits)
    for turn in range(600):
        store = stores[turn % 2]
        used += (await ask(store, limits)).allowed
        if turn % 5 == 0:
            decision, handle = await store.open_hold(counters, 3, 60_000_000)
            assert decision.allowed == (handle is not None)
            if handle is not None:
                handles.append((store, handle))
                held += 3
        if turn % 15 == 0 and handles:
            settling, handle = handles.pop()
            await settling.settle_hold(handle, 1)
            used, held = used + 1, held - 3
        assert used + held <= 200
    assert sum(store.table.decisions for store in stores) > 0, "some were decided from leases"
    for store in stores:
        await store.give_back()
    remaining = await left(stores[0], limits)
    assert remaining is not None
    assert 0 <= 200 - used - held - remaining <= (2 if algorithm.is_bucket else 0), "nothing was counted twice, or not at all"


async def test_the_ledger_counts_what_leases_decide(stores: tuple[LeasedCounters, LeasedCounters]) -> None:
    name = f"leased-{next(NAMES)}"
    policy = f'[[tiers]]\nname = "{name}"\n[[tiers.rules]]\nname = "r"\nendpoint = "/*"\nlimits = ["60/day"]\nsubject = "ip"\n'
    catalog = CachedCatalog(PolicyCatalog(parse_policy(policy + f'[anonymous]\ntier = "{name}"\n')))
    counts = UsageCounts()
    admitted = 0
    for store in stores:
        gate = Gate(catalog, store, counts.observe)
        await ready(store, limit_set("60/day", Algorithm.SLIDING_WINDOW))
        for _ in range(60):
            admitted += (await gate.check(Check.of("/x", ip="192.0.2.7"))).allowed
    assert 50 <= admitted <= 60, "the last units may wait at the other instance"
    assert sum(store.table.decisions for store in stores) > 10
    waiting = Buffer(1_000)
    await waiting.add(counts.take(), counts.take_latency(), time.time_ns() // 1000)
    units = [each for _, each in waiting.next_batch().rules]
    assert sum(each[0] for each in units) == admitted


async def test_nothing_is_leased_beside_an_instance_of_a_version_without_leases(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    store, limits = leased(server), limit_set("1000/day")
    try:
        await ask_until_leased(store, limits)
        until_us = (int(server.call("TIME")[0]) + 3600) * 1_000_000
        server.call("ZADD", "tg:{instances}", until_us, "an older version")
        await until(lambda: not store.table.leases and not store.table.returns)
        assert not store.store.grants(((limits, "s"),))
        await ask(store, limits, 20)
        assert not store.table.leases
        server.call("ZREM", "tg:{instances}", "an older version")
        await ready(store, limits)
        await ask_until_leased(store, limits)
    finally:
        await store.close()
