"""Holds in Lua do step for step what those in memory do, on a real server: same inputs, same outcomes."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import hiredis
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.conftest import Clock
from tests.integration.test_lua_twins import CLOCK_BY_ARGUMENT, HELD, asked, in_lua, limit_set, outcome
from tests.servers.redis_server import RedisServer
from tidegate.counters.holds import HoldHandle
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.redis.command_templates import CommandTemplate
from tidegate.counters.redis.holds import RedisHolds
from tidegate.counters.redis.keyspace import key_of, reset_key_of
from tidegate.counters.redis.scripts import Script, parameters, script
from tidegate.errors import TidegateError
from tidegate.policy.limits import Algorithm, AnyAlgorithm, ConcurrencyAlgorithm, Limit, LimitSet

SUBJECTS = itertools.count()
START_US = 1_699_920_000_000_000
TEXTS = {True: ["20/second burst 40", "300/minute burst 90"], False: ["40/second", "300/minute", "5000/month"]}
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["charge", "open", "open", "settle", "settle", "renew", "reset", "force", "refund"]),
        st.one_of(st.integers(0, 50_000), st.integers(0, 2_500_000), st.sampled_from([0, 1_000_000, 60_000_000])),
        st.integers(0, 45),
        st.integers(1, 4),
        st.integers(0, 6),
    ),
    min_size=1,
    max_size=30,
)


@cache
def with_clock(work: Script) -> Script:
    """A script whose clock is its last argument."""
    plain, tested = script("reset", frozenset()), script("reset", frozenset(), CLOCK_BY_ARGUMENT)
    reset = plain.source[plain.source.index(b"local algorithms") :]
    clock = plain.source[: -len(reset)]
    source = work.source.replace(clock, tested.source[: -len(reset)], 1)
    assert source != work.source
    return Script(source, hashlib.sha1(source).hexdigest())


class LuaHolds:
    """Holds and checks by the scripts, at the moment of a test's clock."""

    def __init__(self, server: RedisServer, clock: Clock) -> None:
        async def run(_: bytes, work: Script, command: bytes) -> Any:
            reader = hiredis.Reader()
            reader.feed(command)
            _, _, count, *parts = reader.gets()
            keys, arguments = parts[: int(count)], parts[int(count) :]
            return asked(server, with_clock(work), keys, *arguments, clock.now_us)

        def template(counters: tuple[tuple[LimitSet, str], ...]) -> CommandTemplate:
            return CommandTemplate(tuple(limits for limits, _ in counters))

        self.holds = RedisHolds(run, run, template, 5)
        self.server, self.clock = server, clock

    def charge(self, counters: tuple[tuple[LimitSet, str], ...], cost: int) -> tuple[Any, ...]:
        sets = [limits for limits, _ in counters]
        work = with_clock(script("charge", frozenset(limits.algorithm for limits in sets)))
        keys = [key_of(*counter) for counter in counters]
        reply = asked(self.server, work, keys, *map(parameters, sets), cost, self.clock.now_us)  # type: ignore[arg-type]
        return in_lua(reply, sets)

    def reset(self, counters: tuple[tuple[LimitSet, str], ...]) -> None:
        for counter in counters:
            slots = b".holds" if counter[0].algorithm is ConcurrencyAlgorithm.CONCURRENT else b""
            keys = [key_of(*counter) + slots, reset_key_of(*counter)]
            asked(self.server, with_clock(script("reset", frozenset())), keys, 120_000, self.clock.now_us)  # type: ignore[arg-type]


def result_of(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except TidegateError as error:
        return error.code


def agree(lua: tuple[Any, ...], memory: tuple[Any, ...], was_reset: bool) -> bool:
    """Whether outcomes are the same. On Redis the holds of a counter stay when it is reset, so a denial after that may be retried
    when one of them would have ended, earlier than necessary."""
    if was_reset and lua[4] and memory[4] and lua[4] < memory[4]:
        lua = (*lua[:4], memory[4], *lua[5:])
    return lua == memory


@pytest.mark.parametrize(
    ("first", "second", "limits_of_first"),
    [
        *zip(Algorithm, [*Algorithm][1:] + [*Algorithm][:1], (2, 2, 1, 2, 1), strict=True),
        (Algorithm.SLIDING_LOG, None, 2),
        (Algorithm.TOKEN_BUCKET, Algorithm.FIXED_WINDOW, 1),
        (Algorithm.SLIDING_WINDOW, None, 1),
        (Algorithm.FIXED_WINDOW, ConcurrencyAlgorithm.CONCURRENT, 2),
    ],
)
def test_twins(redis_server: RedisServer, first: Algorithm, second: AnyAlgorithm | None, limits_of_first: int) -> None:
    sets = [limit_set(first, TEXTS[first.is_bucket][:limits_of_first], "set2")]
    if isinstance(second, Algorithm):
        sets.append(limit_set(second, TEXTS[second.is_bucket][:1], "set1"))
    elif second is not None:
        sets.append(LimitSet("slots", second, [Limit.parse("3 concurrent")]))
    has_bucket = any(limits.algorithm.is_bucket for limits in sets)

    @settings(HELD, max_examples=60, phases=(Phase.explicit, Phase.reuse, Phase.generate))
    @given(STEPS, st.integers(0, 30_000_000), st.booleans())
    def hold(steps: list[tuple[str, int, int, int, int]], into_us: int, looks: bool) -> None:
        clock = Clock(START_US + into_us)
        memory, lua = MemoryCounters(clock=clock), LuaHolds(redis_server, clock)
        memory.max_holds = 5
        counters = tuple((limits, f"s{next(SUBJECTS)}") for limits in sets[:1])
        counters += tuple((limits, counters[0][1]) for limits in sets[1:])
        known: list[tuple[HoldHandle, HoldHandle]] = []
        was_reset = False
        for what, advance, cost, ttl_s, which in steps:
            clock.now_us += advance
            # A check that passes leaves expired holds to later ones; a bucket drains meanwhile.
            if looks or has_bucket:
                assert lua.charge(counters, 0) == outcome(memory.charge_all(counters, 0))
            mine, theirs = known[which % len(known)] if known else (None, None)
            if what == "charge":
                left, right = lua.charge(counters, cost), outcome(memory.charge_all(counters, cost))
                assert left[0] == right[0]
                if looks or not right[0]:
                    assert agree(left, right, was_reset), (what, advance, cost)
            elif what == "open":
                opened = [
                    result_of(lambda: asyncio.run(lua.holds.open(counters, cost, ttl_s * 1_000_000, None, False))),  # noqa: B023
                    result_of(lambda: memory.open_hold_now(counters, cost, ttl_s * 1_000_000)),  # noqa: B023
                ]
                assert isinstance(opened[0], str) == isinstance(opened[1], str), opened
                if isinstance(opened[0], str):
                    assert opened[0] == opened[1]
                    continue
                assert agree(outcome(opened[0][0]), outcome(opened[1][0]), was_reset)
                if opened[0][1] is not None:
                    known.append((opened[0][1], opened[1][1]))
                    assert HoldHandle.of(opened[0][1].text) == opened[0][1]
            elif what == "settle" and mine is not None:
                left = result_of(lambda: asyncio.run(lua.holds.settle(mine, cost)))  # noqa: B023
                right = result_of(lambda: memory.settle_hold_now(theirs, cost))  # noqa: B023
                # Redis forgets by its own clock.
                assert left == right or right == "HOLD_NOT_FOUND", (what, advance, cost)
            elif what == "renew" and mine is not None:
                left = result_of(lambda: asyncio.run(lua.holds.renew(mine, ttl_s * 1_000_000)))  # noqa: B023
                right = result_of(lambda: memory.renew_hold_now(theirs, ttl_s * 1_000_000))  # noqa: B023
                assert left == right or right == "HOLD_NOT_FOUND"
            elif what in ("force", "refund") and cost:
                units = cost if what == "force" else -cost
                counted = tuple(each for each in counters if each[0].algorithm is not ConcurrencyAlgorithm.CONCURRENT)
                left = asyncio.run(lua.holds.adjust(counted, units, False))
                assert outcome(left) == outcome(memory.adjust_now(counted, units)), (what, advance, cost)
            elif what == "reset":
                lua.reset(counters)
                asyncio.run(memory.reset(counters))
                was_reset = True
                # On Redis those of before count as open until they end.
                memory.max_holds = lua.holds.most = 100
                # What is charged in the microsecond of a reset counts as charged before it in Redis.
                clock.now_us += 1
        assert lua.charge(counters, 0) == outcome(memory.charge_all(counters, 0))

    hold()
