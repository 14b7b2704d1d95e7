"""Grant and return in Lua do step for step what their Python twins do, on real servers; so do charges while units are leased."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cases.quotas import quotas_of
from tests.conftest import Clock
from tests.integration.test_lua_twins import CLOCK_BY_ARGUMENT, HELD, asked, limit_set
from tests.model.lease_store import LeaseStore
from tests.servers.redis_server import RedisServer
from tidegate.counters import Charge, GrantingDecision, LastDecision, LeaseRequest, LeaseReturn
from tidegate.counters.redis.scripts import parameters, script
from tidegate.decision import Decision
from tidegate.policy.limits import Algorithm, AnyAlgorithm, LimitSet, QuotaAlgorithm

KEYS = itertools.count()
START_US = 1_700_002_800_000_000 - 20_000_000
"""Shortly before an anchor in a time zone begins a month: 2023-11-15 00:00 in Berlin."""
LEASED = [algorithm for algorithm in Algorithm if algorithm is not Algorithm.SLIDING_LOG]
TEXTS = {True: ["20/second burst 40", "300/minute burst 90"], False: ["40/second", "300/minute", "5000/month"]}
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["charge", "lease", "lease", "back"]),
        st.one_of(st.integers(0, 50_000), st.integers(0, 2_500_000), st.sampled_from([999_999, 1_000_000, 60_000_000])),
        st.integers(0, 12),
        st.integers(1, 60),
        st.integers(2, 5),
        st.sampled_from([100_000, 5_000_000]),
    ),
    min_size=1,
    max_size=30,
)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        *zip(LEASED, LEASED[1:] + LEASED[:1], strict=True),
        (LEASED[0], None),
        (LEASED[1], None),
        (LEASED[2], None),
        (LEASED[1], QuotaAlgorithm.QUOTA),
        (QuotaAlgorithm.QUOTA, None),
    ],
)
def test_twins(any_redis: RedisServer, first: AnyAlgorithm, second: AnyAlgorithm | None) -> None:
    algorithms = frozenset({first} if second is None else {first, second})
    charge, lease, give_back = (script(work, algorithms, CLOCK_BY_ARGUMENT) for work in ("charge", "lease", "give_back"))
    alone = 1 if first is Algorithm.SLIDING_WINDOW and second is None else 2
    sets = [leased_set(each, size) for each, size in ((first, alone), (second, 1)) if each]
    configs = [parameters(limits, START_US) for limits in sets]

    @HELD
    @given(STEPS, st.integers(0, 30_000_000))
    def hold(steps: list[tuple[str, int, int, int, int, int]], into_us: int) -> None:
        clock = Clock(START_US + into_us)
        store = LeaseStore(lambda: clock.now_us)
        counters = tuple((limits, "s") for limits in sets)
        run = next(KEYS)
        keys = [f"lease:{run}:{limits.name}" for limits in sets]
        held: list[LeaseReturn] = []
        for what, advance, cost, want, divisor, ttl_us in steps:
            clock.now_us += advance
            if what == "back":
                if held:
                    lease_held = held.pop(want % len(held))
                    returned = msgspec.structs.replace(lease_held, unused=min(cost, lease_held.granted))
                    store.give_back(returned)
                    plan = (len(keys), returned.granted, returned.unused, returned.at_us, returned.ends_us)
                    numbers = msgspec.msgpack.encode((*plan, *range(2, len(keys) + 2)))
                    pairs = [name for key in keys for name in (key, f"{key}.reset")]
                    asked(any_redis, give_back, pairs, numbers, *configs, clock.now_us)
                continue
            request = LeaseRequest(want, divisor, ttl_us, want % 9) if what == "lease" else None
            decision = store.charge(Charge(counters, cost, request))
            expected = (decision.allowed, decision.binding, decision.remaining, decision.retry_after_us)
            if request is None:
                reply = asked(any_redis, charge, keys, *configs, cost, clock.now_us)
                assert in_python(reply, sets) == expected
                assert reply[2] == decision.reset_after_us
                continue
            numbers = msgspec.msgpack.encode((want, divisor, ttl_us, want % 9))
            reply = asked(any_redis, lease, keys, *configs, cost, numbers, clock.now_us)
            assert in_python(reply, sets) == expected
            assert in_limits(reply[5:], sets) == grant_of(decision)
            if isinstance(decision, GrantingDecision):
                held.append(LeaseReturn(counters, decision.granted, 0, clock.now_us, decision.ends_us))

    hold()


def in_limits(found: list[Any], sets: Sequence[LimitSet]) -> list[Any]:
    """What follows in a reply, with the limit that denies in place of its number: two sets may have the same."""
    if not isinstance(found[1], list):
        return found
    places = [limit for limits in sets for limit in limits.limits]
    return [found[0], [places[found[1][0] - 1], *found[1][1:]]]


def grant_of(decision: Decision) -> list[Any]:
    """What should follow the answer to the check itself."""
    leased = [0, 0, 0, 0, 0]
    if isinstance(decision, GrantingDecision):
        if decision.ahead is None:
            return [decision.granted, decision.ends_us]
        ahead = decision.ahead
        start_us = ahead.end_us - ahead.window_us
        leased = [decision.granted, decision.ends_us, ahead.current, ahead.previous, start_us // 1_000_000]
    denial = decision.following if isinstance(decision, GrantingDecision | LastDecision) else decision
    if denial is None or denial.allowed:
        return [0, 0]
    retry_us = -1 if denial.retry_after_us is None else denial.retry_after_us
    return [0, [denial.binding, denial.remaining, denial.reset_after_us, retry_us, *leased]]


def leased_set(algorithm: AnyAlgorithm, size: int) -> LimitSet:
    if algorithm is QuotaAlgorithm.QUOTA:
        return quotas_of(("300/minute", "5000/month")[:size], None, "2023-11-15", "Europe/Berlin")
    assert isinstance(algorithm, Algorithm)
    return limit_set(algorithm, TEXTS[algorithm.is_bucket][:size], f"set{size}")


def in_python(reply: Sequence[int], sets: Sequence[LimitSet]) -> tuple[Any, ...]:
    places = [limit for limits in sets for limit in limits.limits]
    return reply[0] > 0, places[abs(reply[0]) - 1], reply[1], None if reply[3] < 0 else reply[3]


@pytest.mark.parametrize("algorithm", LEASED)
def test_a_lease_before_a_reset_is_not_given_back(any_redis: RedisServer, algorithm: Algorithm) -> None:
    lease, give_back, charge = (script(work, frozenset((algorithm,))) for work in ("lease", "give_back", "charge"))
    reset = script("reset", frozenset())
    limits = limit_set(algorithm, ["1000/day burst 1000" if algorithm.is_bucket else "1000/day"])
    key = f"lease:{next(KEYS)}"
    config = parameters(limits)
    granted = asked(any_redis, lease, [key], config, 1, msgspec.msgpack.encode((50, 2, 5_000_000)))
    assert granted[5] == 50
    ttl_ms = any_redis.call("PTTL", key)
    assert 0 < ttl_ms <= 2 * 86_400_000
    numbers = msgspec.msgpack.encode((1, 50, 20, granted[4], granted[6], 2))
    back = (give_back, [key, f"{key}.reset"], numbers, config)
    assert asked(any_redis, *back) == [1]
    assert 949 + 20 <= asked(any_redis, charge, [key], config, 0)[1] <= 949 + 21
    assert any_redis.call("PTTL", key) <= ttl_ms
    asked(any_redis, reset, [key, f"{key}.reset"], "60000")
    assert asked(any_redis, charge, [key], config, 100)[1] == 900
    assert asked(any_redis, *back) == [0]
    assert asked(any_redis, charge, [key], config, 0)[1] <= 901


def test_memory_while_leased(any_redis: RedisServer) -> None:
    for algorithm, most in ((Algorithm.FIXED_WINDOW, 0), (Algorithm.SLIDING_WINDOW, 0), (Algorithm.TOKEN_BUCKET, 24)):
        limits = limit_set(algorithm, ["600/day"])  # whose window does not end between the calls
        sizes = []
        # One unit is leased: a larger count takes more bytes of its own.
        for work, extra in (("charge", ()), ("lease", (msgspec.msgpack.encode((1, 2, 5_000_000)),))):
            usages = []
            # Of thirty equal values Valkey stores about one beside its key, not within: the smallest of several counts.
            for _ in range(5):
                key = f"lease:{next(KEYS):06}"
                for _ in range(3):
                    asked(any_redis, script(work, frozenset((algorithm,))), [key], parameters(limits), 50, *extra)
                usages.append(any_redis.call("MEMORY", "USAGE", key))
            sizes.append(min(usages))
        assert sizes[1] - sizes[0] <= most, algorithm
