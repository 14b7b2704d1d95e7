"""Quotas on Redis: the Lua does step for step what its Python twin does, and no bound is passed by many checks at once."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cases.quotas import CASES, quotas_of, us
from tests.conftest import Clock
from tests.integration.test_lua_twins import CLOCK_BY_ARGUMENT, HELD, asked
from tests.servers.redis_server import RedisServer
from tests.unit.test_quotas import require_as_expected
from tidegate.algorithms import MERGE
from tidegate.counters import Charge
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.redis.scripts import parameters, script, wire_states
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Decision
from tidegate.policy.limits import Algorithm, Limit, LimitSet, QuotaAlgorithm

KEYS = itertools.count()
CHARGE = script("charge", frozenset((Algorithm.SLIDING_WINDOW, QuotaAlgorithm.QUOTA)), CLOCK_BY_ARGUMENT)


def charged(server: RedisServer, keys: list[str], sets: list[LimitSet], cost: int, now_us: int, instance_us: int = 0) -> Decision:
    packed = [parameters(limits, instance_us or now_us, charging=True) for limits in sets]
    binding, least, reset, retry, at_us = asked(server, CHARGE, keys, *packed, cost, now_us)
    limit = [limit for limits in sets for limit in limits.limits][abs(binding) - 1]
    return Decision(
        binding > 0, limit, max(least, 0), reset, None if retry < 0 else retry, at_us, sets[0], overage=max(-least, 0)
    )


@pytest.mark.parametrize("name", CASES)
def test_table_of_cases(redis_server: RedisServer, name: str) -> None:
    key = f"quota:{next(KEYS)}:{secrets.token_hex(4)}"
    for step in CASES[name]:
        require_as_expected(step, charged(redis_server, [key], [step.limits], step.cost, step.at_us))


def test_the_twins_agree(redis_server: RedisServer) -> None:
    """Random plans, beside a soft rule; the instance's clock is up to half a day from the store's."""
    zones = st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Africa/Cairo", "Pacific/Auckland"])
    dates = st.sampled_from([None, "2026-01-31", "2024-02-29", "2026-07-15"])
    periods = st.lists(st.sampled_from(["second", "hour", "day", "week", "month", "year"]), min_size=1, max_size=3, unique=True)
    plans = st.tuples(st.integers(1, 9), st.sampled_from([None, 0, 50]), dates, zones)
    advances = st.one_of(st.integers(0, 3_600_000_000), st.integers(0, 40 * 86_400_000_000))
    steps = st.lists(st.tuples(advances, st.integers(0, 6), st.integers(-43_200_000_000, 43_200_000_000)), min_size=1, max_size=6)

    @HELD
    @given(
        st.integers(us("2023-01-01T00:00Z"), us("2029-01-01T00:00Z")),
        periods,
        st.lists(st.tuples(plans, steps), max_size=3),
        st.booleans(),
    )
    def hold(start: int, names: list[str], phases: list[tuple[Any, list[tuple[int, int, int]]]], soft: bool) -> None:
        keys = [f"quota:{next(KEYS)}:{secrets.token_hex(4)}" for _ in range(2)]
        clock = Clock(start)
        memory = MemoryCounters(clock=clock)
        rule = LimitSet("rule", Algorithm.SLIDING_WINDOW, [Limit.parse("4/minute"), Limit.parse("9/day")], soft=soft)
        for (amount, overage, date, zone), own in phases:
            quotas = quotas_of(tuple(f"{amount}/{name}" for name in names), overage, date, zone)
            for advance, cost, skew in own:
                clock.now_us += advance
                expected = memory.charge_all(((rule, "s"), (quotas, "s")), cost)
                given = charged(redis_server, keys, [rule, quotas], cost, clock.now_us, clock.now_us + skew)
                assert given == msgspec.structs.replace(expected, at_us=given.at_us), (quotas, advance, cost)

    hold()


def test_what_was_admitted_elsewhere_is_added_alike(redis_server: RedisServer) -> None:
    absorb = script("absorb", frozenset((QuotaAlgorithm.QUOTA,)), CLOCK_BY_ARGUMENT)
    times = st.integers(us("2026-11-27T00:00Z") // 1_000_000, us("2026-12-03T00:00Z") // 1_000_000)
    states = st.one_of(st.none(), st.tuples(times.map(lambda at: at * 1_000_000), st.integers(-5, 9)))

    @HELD
    @given(st.lists(st.tuples(states, states), min_size=1, max_size=4))
    def hold(added: list[tuple[Any, Any]]) -> None:
        key, limits = f"quota:{next(KEYS)}:{secrets.token_hex(4)}", quotas_of(("50/day", "90/month"), 0, None, "Europe/Berlin")
        now_us = us("2026-12-03T12:00Z")
        expected: list[Any] = [None, None]
        for pair in added:
            for place, state in enumerate(pair):
                if state is not None:
                    expected[place] = MERGE[limits.algorithm](limits.limits[place], expected[place], state)
            asked(redis_server, absorb, [key], parameters(limits, now_us), wire_states(limits, pair), now_us)
        raw = redis_server.call("GET", key)
        flat = [] if raw is None else _unpacked(raw)
        held = {flat[at]: (flat[at + 1] * 1_000_000, flat[at + 2]) for at in range(0, len(flat), 3)}
        assert held == {number: state for number, state in zip((4, 6), expected, strict=True) if state is not None}

    hold()


def _unpacked(raw: Any) -> list[int]:
    """Values that were packed one after another."""
    data, found = raw if isinstance(raw, bytes) else raw.encode("latin-1"), []
    while data:
        for size in range(1, 10):
            try:
                found.append(msgspec.msgpack.decode(data[:size]))
            except msgspec.DecodeError:
                continue
            data = data[size:]
            break
        else:
            raise AssertionError(data)
    return found


@pytest.mark.parametrize("kind", ["redis_server", "redis_cluster"])
async def test_many_checks_at_once_never_pass_a_bound(kind: str, request: pytest.FixtureRequest) -> None:
    stores = [RedisCounters(request.getfixturevalue(kind).url, timeout_s=10) for _ in range(3)]
    rule = LimitSet("pro:rule", Algorithm.SLIDING_WINDOW, [Limit.parse("1000/day")])
    soft = LimitSet("pro:soft", Algorithm.TOKEN_BUCKET, [Limit.parse("7/day")], soft=True)
    quotas = quotas_of(("50/month",), 20, "2026-01-31", "Europe/Berlin")
    subject = f"k:{secrets.token_hex(12)}"
    charges = [Charge(((rule, subject), (soft, subject), (quotas, subject)), 1) for _ in range(40)]
    outcomes = [each for found in await asyncio.gather(*(store.charge(charges) for store in stores)) for each in found]
    decisions = [each for each in outcomes if isinstance(each, Decision)]
    assert len(decisions) == 120
    assert sum(each.allowed for each in decisions) == 60, "50 and 20 % more"
    assert sum(each.overage for each in decisions) == 53, "above the soft limit; what is above the quota too is counted once"
    windows = await stores[0].windows([(rule, subject), (soft, subject), (quotas, subject)])
    assert [[(each.remaining, each.overage) for each in found or ()] for found in windows] == [[(940, 0)], [(0, 0)], [(0, 10)]]
    # A subject of another shard, such as a customer beside its key.
    customer = f"c:{secrets.token_hex(4)}"
    split = [Charge(((rule, subject), (quotas, customer)), 1) for _ in range(30)]
    found = await asyncio.gather(*(store.charge([each]) for store in stores for each in split))
    assert sum(each.allowed for (each,) in found if isinstance(each, Decision)) == 60
    ((over,), *_) = await stores[0].windows([(quotas, customer)])
    assert over is not None
    assert (over.remaining, over.overage) == (0, 10)
    for store in stores:
        await store.reset([(rule, subject), (soft, subject), (quotas, subject), (quotas, customer)])
        await store.close()


async def test_the_periods_that_are_sent_follow_the_clock(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command is prepared once for all checks, but not beyond the period that it was prepared in."""
    store = RedisCounters(redis_server.url, timeout_s=10)
    quotas = quotas_of(("5/day",), None, None, "Asia/Kolkata")
    subject = f"k:{secrets.token_hex(12)}"
    counters = ((quotas, subject),)
    await store.start()
    template = store._template(counters)
    assert store._template(counters) is template
    monkeypatch.setattr("tidegate.counters.redis.store.time.time", lambda: template.until_s)
    assert store._template(counters) is not template
    await store.close()
