"""Each Lua script does step for step what its Python twin does, on real servers: same inputs, same outcomes.

`MemoryCounters` runs the Python, Redis and Valkey run the Lua. In most tests the clock is an argument, so that years pass in a
test; the last ones leave the scripts as they are and give the Python the moments that the server answered.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.conftest import MOMENT_US, Clock
from tests.servers.redis_server import RedisServer
from tidegate.algorithms import DECIDE, MERGE
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.redis.scripts import Script, parameters, script, wire_states
from tidegate.decision import Decision
from tidegate.policy.limits import Algorithm, Limit, LimitSet

CLOCK_BY_ARGUMENT = """
local now = tonumber(ARGV[#ARGV])
local real = redis
-- Keys must not expire by the server's clock while the test's stands still.
local redis = {call = function(command, ...)
  if command == 'PEXPIRE' then
    return 1
  elseif command == 'SET' then
    local key, value = ...
    return real.call('SET', key, value)
  end
  return real.call(command, ...)
end}
"""
WINDOWS = ("second", "7s", "minute", "hour", "day", "week", "month", "year", "366d")
LENGTHS_US = (1_000_000, 7_000_000, 60_000_000, 3_600_000_000, 86_400_000_000)
KEYS = itertools.count()
HELD = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def limit_texts(algorithm: Algorithm) -> st.SearchStrategy[list[str]]:
    most = 60 if algorithm is Algorithm.SLIDING_LOG else 1_000_000_000
    amounts = st.one_of(st.integers(1, 10), st.integers(1, most), st.sampled_from([most, 1, 7]))
    if algorithm.is_bucket:
        # Amounts and bursts that `fit_limits` takes as exactly countable.
        one = st.tuples(st.sampled_from([1, 2, 3, 5, 10, 60, 100, 1000]), st.sampled_from(WINDOWS[:-2]), st.integers(1, 300)).map(
            lambda parts: f"{parts[0]}/{parts[1]} burst {parts[2]}"
        )
        return st.lists(one, min_size=1, max_size=3, unique_by=lambda text: text.split("/")[1].split()[0])
    return st.lists(
        st.tuples(amounts, st.sampled_from(WINDOWS)).map(lambda parts: f"{parts[0]}/{parts[1]}"),
        min_size=1,
        max_size=4,
        unique_by=lambda text: text.split("/")[1],
    )


ADVANCES = st.one_of(
    st.integers(0, 3),
    st.integers(0, 2_000_000),
    st.sampled_from([length * times + more for length in LENGTHS_US for times in (1, 2) for more in (-1, 0, 1)]),
    st.integers(0, 40 * 86_400_000_000),
    st.integers(0, 800 * 86_400_000_000),
)
# At the start of a week all windows but months and years begin: there, borders are met exactly.
STARTS = st.one_of(st.integers(0, 4900).map(lambda week: week * 604_800_000_000), st.integers(0, 3_000_000_000_000_000))
COSTS = st.one_of(st.integers(0, 3), st.integers(0, 70), st.integers(0, 1_000_000_000))
STEPS = st.lists(st.tuples(ADVANCES, COSTS), min_size=1, max_size=25)


def asked(server: RedisServer, work: Script, keys: list[str], *arguments: Any) -> Any:
    reply = server.call("EVALSHA", work.sha, len(keys), *keys, *arguments)
    if isinstance(reply, Exception) and str(reply).startswith("NOSCRIPT"):
        reply = server.call("EVAL", work.source, len(keys), *keys, *arguments)
    assert not isinstance(reply, Exception), reply
    return reply


def outcome(decision: Decision) -> tuple[Any, ...]:
    return (
        decision.allowed,
        None if decision.binding is None else decision.binding.text,
        decision.remaining,
        decision.reset_after_us,
        decision.retry_after_us,
    )


def in_lua(reply: list[int], sets: list[LimitSet]) -> tuple[Any, ...]:
    binding, least, reset, retry, _ = reply
    places = [limit for limits in sets for limit in limits.limits]
    return binding > 0, places[abs(binding) - 1].text, least, reset, None if retry < 0 else retry


def limit_set(algorithm: Algorithm, texts: list[str], name: str = "twin") -> LimitSet:
    return LimitSet(name, algorithm, [Limit.parse(text) for text in texts])


@pytest.mark.parametrize("algorithm", Algorithm)
def test_one_counter(any_redis: RedisServer, algorithm: Algorithm) -> None:
    work = script("charge", frozenset((algorithm,)), CLOCK_BY_ARGUMENT)

    @HELD
    @given(limit_texts(algorithm), STEPS, STARTS)
    def hold(texts: list[str], steps: list[tuple[int, int]], start: int) -> None:
        limits, key = limit_set(algorithm, texts), f"twin:{next(KEYS)}"
        clock = Clock(start)
        memory = MemoryCounters(clock=clock)
        for advance, cost in steps:
            clock.now_us = max(clock.now_us + advance, 0)
            reply = asked(any_redis, work, [key], parameters(limits), cost, clock.now_us)
            assert in_lua(reply, [limits]) == outcome(memory.charge_one(limits, "s", cost)), (limits, advance, cost)

    hold()


@pytest.mark.parametrize("algorithm", Algorithm)
def test_limits_that_change_keep_what_was_consumed(any_redis: RedisServer, algorithm: Algorithm) -> None:
    work = script("charge", frozenset((algorithm,)), CLOCK_BY_ARGUMENT)

    @HELD
    @given(
        st.lists(
            st.tuples(limit_texts(algorithm), st.lists(st.tuples(st.integers(0, 90_000_000), COSTS), max_size=4)), max_size=6
        )
    )
    def hold(phases: list[tuple[list[str], list[tuple[int, int]]]]) -> None:
        key = f"twin:{next(KEYS)}"
        clock = Clock()
        states: dict[str, Any] = {}
        for texts, steps in phases:
            limits = limit_set(algorithm, texts)
            for advance, cost in steps:
                clock.now_us += advance
                # The twin by hand: states by window, as far as the rule had the window at the last charge.
                outcomes = [
                    DECIDE[algorithm](limit, states.get(limit.window_name), clock.now_us, cost) for limit in limits.limits
                ]
                reply = asked(any_redis, work, [key], parameters(limits), cost, clock.now_us)
                assert (reply[0] > 0) == all(state is not None for state, *_ in outcomes)
                least = min(
                    left for state, left, *_ in outcomes if (state is None) == any(state is None for state, *_ in outcomes)
                )
                assert reply[1] == least
                if reply[0] > 0 and cost:
                    states = {limit.window_name: state for limit, (state, *_) in zip(limits.limits, outcomes, strict=True)}

    hold()


@given(
    st.sampled_from(list(Algorithm)),
    st.sampled_from(list(Algorithm)),
    st.lists(st.tuples(st.integers(0, 5_000_000), st.integers(0, 4)), min_size=1, max_size=20),
)
@HELD
def test_two_counters_are_charged_together_or_not_at_all(
    any_redis: RedisServer, first: Algorithm, second: Algorithm, steps: list[tuple[int, int]]
) -> None:
    work = script("charge", frozenset((first, second)), CLOCK_BY_ARGUMENT)
    sets = [limit_set(first, ["5/7s", "20/hour"], "rule"), limit_set(second, ["8/minute"], "tier")]
    keys = [f"twin:{next(KEYS)}", f"twin:{next(KEYS)}"]
    clock = Clock()
    memory = MemoryCounters(clock=clock)
    for advance, cost in steps:
        clock.now_us += advance
        reply = asked(any_redis, work, keys, *(parameters(limits) for limits in sets), cost, clock.now_us)
        assert in_lua(reply, sets) == outcome(memory.charge_all(tuple((limits, "s") for limits in sets), cost))


@given(
    st.lists(
        st.tuples(st.integers(0, 3_000_000), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=12)), max_size=5
    )
)
@HELD
def test_a_batch_decides_as_single_checks_do(any_redis: RedisServer, batches: list[tuple[int, list[tuple[int, int]]]]) -> None:
    work = script("charge_many", frozenset(Algorithm), CLOCK_BY_ARGUMENT)
    run = next(KEYS)
    sets = [limit_set(algorithm, ["5/7s", "12/minute"], f"{algorithm}") for algorithm in Algorithm]
    clock = Clock()
    memory = MemoryCounters(clock=clock)
    for advance, asks in batches:
        clock.now_us += advance
        keys: list[str] = []
        plan: list[int] = []
        expected = []
        for number, cost in asks:
            # Number 5 stands for a check of two counters.
            own = sets[:2] if number == 5 else [sets[number]]
            keys += [f"twin:{run}:{limits.name}" for limits in own]
            plan += [len(own), cost, *(sets.index(limits) + 2 for limits in own)]
            expected.append((own, outcome(memory.charge_all(tuple((limits, "s") for limits in own), cost))))
        reply = asked(any_redis, work, keys, msgspec.msgpack.encode(plan), *(parameters(limits) for limits in sets), clock.now_us)
        assert len(reply) == 5 * len(asks)
        for place, (own, each) in enumerate(expected):
            assert in_lua(reply[5 * place : 5 * place + 5], own) == each


@pytest.mark.parametrize("algorithm", Algorithm)
def test_a_window_ends_to_the_microsecond(any_redis: RedisServer, algorithm: Algorithm) -> None:
    work = script("charge", frozenset((algorithm,)), CLOCK_BY_ARGUMENT)
    for text, length_us in (("5/minute", 60_000_000), ("5/7s", 7_000_000), ("5/day", 86_400_000_000)):
        limits = limit_set(algorithm, [text])
        start = 2000 * 604_800_000_000
        for into, times, more in itertools.product((0, 1, length_us // 3, length_us - 1), (1, 2, 3), (-1, 0, 1)):
            key = f"twin:{next(KEYS)}"
            clock = Clock(start + into)
            memory = MemoryCounters(clock=clock)
            for now in (start + into, start + length_us * times + more, start + into + length_us * times + more):
                clock.now_us = max(now, clock.now_us)
                for cost in (3, 1, 2):
                    reply = asked(any_redis, work, [key], parameters(limits), cost, clock.now_us)
                    assert in_lua(reply, [limits]) == outcome(memory.charge_one(limits, "s", cost))


@pytest.mark.parametrize("algorithm", Algorithm)
def test_states_of_elsewhere_are_added_alike(any_redis: RedisServer, algorithm: Algorithm) -> None:
    charge = script("charge", frozenset((algorithm,)), CLOCK_BY_ARGUMENT)
    absorb = script("absorb", frozenset((algorithm,)), CLOCK_BY_ARGUMENT)
    some = st.lists(st.tuples(st.integers(0, 40_000_000), st.integers(1, 9)), max_size=6)

    @HELD
    @given(limit_texts(algorithm), some, some, st.integers(0, 100_000_000), st.booleans())
    def hold(texts: list[str], here: list[tuple[int, int]], there: list[tuple[int, int]], later: int, give_back: bool) -> None:
        limits, key = limit_set(algorithm, texts), f"twin:{next(KEYS)}"
        decide, merge = DECIDE[algorithm], MERGE[algorithm]
        # As two processes would: both begin with nothing consumed and charge all windows or none.
        mine, other = [[None] * len(limits.limits) for _ in range(2)]
        latest = MOMENT_US
        for steps, states in ((here, mine), (there, other)):
            now = MOMENT_US
            for advance, cost in steps:
                now += advance
                outcomes = [decide(limit, state, now, cost)[0] for limit, state in zip(limits.limits, states, strict=True)]
                if all(state is not None for state in outcomes):
                    states[:] = outcomes
                if states is mine:
                    asked(any_redis, charge, [key], parameters(limits), cost, now)
            latest = max(latest, now)
        if give_back and other[0] is not None:
            other = [negative(state) for state in other]
        now = latest + later
        asked(any_redis, absorb, [key], parameters(limits), wire_states(limits, other), now)
        merged = [
            state if more is None else merge(limit, state, more)
            for limit, state, more in zip(limits.limits, mine, other, strict=True)
        ]
        for cost in (0, 1, 3):
            outcomes = [decide(limit, state, now, cost) for limit, state in zip(limits.limits, merged, strict=True)]
            reply = asked(any_redis, charge, [key], parameters(limits), cost, now)
            assert (reply[0] > 0) == all(state is not None for state, *_ in outcomes)
            denied = reply[0] < 0
            assert reply[1] == min(left for state, left, *_ in outcomes if (state is None) == denied)
            if not denied and cost:
                merged = [state for state, *_ in outcomes]

    hold()


def negative(state: Any) -> Any:
    if isinstance(state[1], tuple):
        return -state[0], state[1], tuple(-cost for cost in state[2])
    return (-state[0], *state[1:]) if len(state) == 4 else (state[0], *(-units for units in state[1:]))


def test_a_denial_of_a_long_log_is_bounded(any_redis: RedisServer) -> None:
    work = script("charge", frozenset((Algorithm.SLIDING_LOG,)), CLOCK_BY_ARGUMENT)
    limits, key, entries = limit_set(Algorithm.SLIDING_LOG, ["100000/day"]), f"twin:{next(KEYS)}", 100_000
    header = [MOMENT_US + entries - 1, 86_400, entries, 0]
    any_redis.must("RPUSH", key, b"".join(map(msgspec.msgpack.encode, header)))
    for first in range(0, entries, 10_000):
        moments = range(MOMENT_US + first, MOMENT_US + first + 10_000)
        any_redis.must("RPUSH", key, *(msgspec.msgpack.encode(moment) + b"\x01" for moment in moments))
    memory = MemoryCounters(clock=Clock(MOMENT_US + entries))
    memory.add(limits, "s", [(entries, tuple(range(MOMENT_US, MOMENT_US + entries)), (1,) * entries)])
    for cost in (1, 1_000, 1_001, 50_000, 100_000):
        any_redis.must("CONFIG", "RESETSTAT")
        reply = asked(any_redis, work, [key], parameters(limits), cost, MOMENT_US + entries)
        assert in_lua(reply, [limits]) == outcome(memory.charge_one(limits, "s", cost))
        ranges = any_redis.facts("INFO", "commandstats").get("cmdstat_lrange", "calls=0").partition(",")[0]
        # 1, 8, 64, 512 and 1,024 entries; all of them take a hundred.
        assert int(ranges.removeprefix("calls=")) <= 6
    # Long after, nothing of it is read to find that all of it has expired.
    any_redis.must("CONFIG", "RESETSTAT")
    asked(any_redis, work, [key], parameters(limits), 1, MOMENT_US + 2 * 86_400_000_000)
    assert "cmdstat_lrange" not in any_redis.facts("INFO", "commandstats")
    any_redis.must("DEL", key)


@given(st.integers(0, 1_000_000_000), st.integers(1, 31_622_400_000_000), st.integers(1, 31_622_400_000_000))
@example(1_000_000_000, 31_622_400_000_000, 31_622_400_000_000)
@example(999_999_999, 31_622_399_999_999, 31_622_400_000_000)
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_long_division_is_exact(any_redis: RedisServer, a: int, b: int, c: int) -> None:
    source = (
        script("charge", frozenset((Algorithm.SLIDING_LOG,)))
        .source.decode()
        .partition("local algorithms")[2]
        .partition("-- Twin")[0]
    )
    source = (
        "local algorithms"
        + source
        + (
            "local q, r = multiply_divide(tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]))"
            " return {string.format('%.0f', q), string.format('%.0f', r)}"
        )
    )
    if a * b // c < 2**53:
        reply = any_redis.call("EVAL", source, 0, a, b, c)
        assert [int(part) for part in reply] == list(divmod(a * b, c))


@pytest.mark.parametrize("algorithm", Algorithm)
def test_scripts_as_they_are_on_the_servers_own_clock(any_redis: RedisServer, algorithm: Algorithm) -> None:
    work = script("charge", frozenset((algorithm,)))
    limits = limit_set(algorithm, ["3/second", "5/2s", "1000/month"])
    key = f"twin:{next(KEYS)}"
    clock = Clock()
    memory = MemoryCounters(clock=clock)
    verdicts = set()
    for step in range(60):
        reply = asked(any_redis, work, [key], parameters(limits), step % 3)
        clock.now_us = reply[4]
        assert abs(clock.now_us / 1e6 - time.time()) < 5
        assert in_lua(reply, [limits]) == outcome(memory.charge_one(limits, "s", step % 3))
        verdicts.add(reply[0] > 0)
        time.sleep(0.04)
    assert verdicts == {True, False}


@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize("text", ["2/3s", "100/minute", "10/month", "10/year"])
def test_every_key_expires_and_a_denied_check_writes_nothing(any_redis: RedisServer, algorithm: Algorithm, text: str) -> None:
    work = script("charge", frozenset((algorithm,)))
    limits = limit_set(algorithm, [text])
    key = f"twin:{next(KEYS)}"
    assert asked(any_redis, work, [key], parameters(limits), 0)[0] == 1
    assert any_redis.call("EXISTS", key) == 0
    reply = asked(any_redis, work, [key], parameters(limits), 1)
    ttl_ms = any_redis.call("PTTL", key)
    assert reply[2] // 1000 - 2_000 <= ttl_ms <= -(-reply[2] // 1000)
    before = any_redis.call("DUMP", key)
    assert asked(any_redis, work, [key], parameters(limits), 1_000_000_000)[0] == -1
    assert any_redis.call("DUMP", key) == before


def test_a_log_that_was_emptied_is_not_looked_through_again(any_redis: RedisServer) -> None:
    work = script("charge", frozenset((Algorithm.SLIDING_LOG,)), CLOCK_BY_ARGUMENT)
    limits, key = limit_set(Algorithm.SLIDING_LOG, ["1000/minute"]), f"twin:{next(KEYS)}"
    for step in range(1000):
        assert asked(any_redis, work, [key], parameters(limits), 1, MOMENT_US + step)[0] == 1
    assert any_redis.call("LLEN", key) == 1001
    assert asked(any_redis, work, [key], parameters(limits), 0, MOMENT_US + 60_000_900)[1] == 901
    assert any_redis.call("LLEN", key) == 100
    assert asked(any_redis, work, [key], parameters(limits), 902, MOMENT_US + 60_000_900)[0] == -1
    assert asked(any_redis, work, [key], parameters(limits), 901, MOMENT_US + 60_000_900)[0] == 1
    assert any_redis.call("LLEN", key) == 101
