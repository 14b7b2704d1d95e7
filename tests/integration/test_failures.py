"""Rules that count failures, on real Redis servers: the Lua twin, and parallel guesses at several instances."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.conftest import Clock
from tests.integration.test_hold_twins import LuaHolds, agree, result_of, with_clock
from tests.integration.test_lua_twins import HELD, asked, outcome
from tests.moments import PATIENCE_S
from tests.servers.redis_cluster import RedisCluster
from tests.servers.redis_server import RedisServer
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.holds import HoldHandle
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.redis.keyspace import key_of, reset_key_of
from tidegate.counters.redis.scripts import script
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Check
from tidegate.gate.gate import Gate
from tidegate.policy.failures import FailureCount
from tidegate.policy.limits import Algorithm, FailureAlgorithm, Limit, LimitSet
from tidegate.policy.toml_reader import parse_policy

SUBJECTS = itertools.count()
START_US = 1_699_920_000_000_000
TIMEOUT_S = 5.0
POLICY = """
[[tiers]]
name = "public"
limits = ["1000/hour"]

  [[tiers.rules]]
  endpoint = "/login"
  subject = "user"
  limits = ["5/15m"]
  count = "failures"
  clear_on_success = true
  penalty = ["1m", "5m"]

[anonymous]
tier = "public"
"""
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["check", "open", "open", "fail", "fail", "succeed", "unknown", "force", "reset"]),
        st.one_of(st.integers(0, 2_500_000), st.sampled_from([0, 1_000_000, 10_000_000, 60_000_000])),
        st.integers(1, 4),
        st.integers(0, 4),
    ),
    min_size=1,
    max_size=30,
)


def reset_in_lua(server: RedisServer, counters: tuple[tuple[LimitSet, str], ...], clock: Clock) -> None:
    """As `RedisCounters.reset`."""
    work = with_clock(script("reset", frozenset()))
    for counter in counters:
        names = [key_of(*counter)] if counter[0].failures is None else [key_of(*counter) + b".holds", key_of(*counter)]
        for name in names:
            asked(server, work, [name, reset_key_of(*counter)], 120_000, clock.now_us)  # type: ignore[arg-type]


def failure_set(texts: Sequence[str], failures: FailureCount) -> LimitSet:
    limits = [Limit.parse(text) for text in texts]
    return LimitSet("failing", FailureAlgorithm.FAILURES, limits, failures=failures)


def test_twins(redis_server: RedisServer) -> None:
    tier = LimitSet("tier", Algorithm.FIXED_WINDOW, [Limit.parse("30/minute")])

    @settings(HELD, max_examples=60, phases=(Phase.explicit, Phase.reuse, Phase.generate))
    @given(STEPS, st.booleans(), st.sampled_from([(), (2, 8)]))
    def hold(steps: list[tuple[str, int, int, int]], clears: bool, penalty: tuple[int, ...]) -> None:
        clock = Clock(START_US)
        memory, lua = MemoryCounters(clock=clock), LuaHolds(redis_server, clock)
        failing = failure_set(["3/10s", "5/minute"], FailureCount(clear_on_success=clears, penalty_s=penalty))
        counters = ((failing, subject := f"f{next(SUBJECTS)}"), (tier, subject))
        known: list[tuple[HoldHandle, HoldHandle]] = []
        was_reset = False
        for what, advance, ttl_s, which in steps:
            clock.now_us += advance
            assert lua.charge(counters, 0) == outcome(memory.charge_all(counters, 0))
            if what == "check":
                assert agree(lua.charge(counters, 1), outcome(memory.charge_all(counters, 1)), was_reset)
            elif what == "open":
                theirs = asyncio.run(lua.holds.open(counters, 1, ttl_s * 1_000_000, None, False))
                mine = memory.open_hold_now(counters, 1, ttl_s * 1_000_000)
                assert agree(outcome(theirs[0]), outcome(mine[0]), was_reset)
                if theirs[1] is not None and mine[1] is not None:
                    known.append((theirs[1], mine[1]))
                    assert HoldHandle.of(theirs[1].text) == theirs[1]
            elif what == "force":
                assert outcome(asyncio.run(lua.holds.adjust(counters, 2, False))) == outcome(memory.adjust_now(counters, 2))
            elif what == "reset":
                reset_in_lua(redis_server, counters, clock)
                asyncio.run(memory.reset(counters))
                known.clear()
                was_reset = True
                clock.now_us += 1
            elif known:
                left, right = known[which % len(known)]
                cost, success = int(what == "fail"), what == "succeed"
                theirs_settled = result_of(lambda: asyncio.run(lua.holds.settle(left, cost, success)))  # noqa: B023
                mine_settled = result_of(lambda: memory.settle_hold_now(right, cost, success))  # noqa: B023
                # Redis forgets settled holds by its own clock, which the test does not move.
                if mine_settled == "HOLD_NOT_FOUND" and theirs_settled != mine_settled:
                    assert theirs_settled.repeated
                else:
                    assert theirs_settled == mine_settled
        assert lua.charge(counters, 0) == outcome(memory.charge_all(counters, 0))

    hold()


def gate_on(url: str) -> Gate:
    return Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), GuardedCounters(RedisCounters(url, TIMEOUT_S)))


async def guess_in_parallel(gates: Sequence[Gate]) -> None:
    """50 guesses at once reach the password check 5 times; a penalty follows, which a success of another user does not end."""
    user = {"user": f"u{next(SUBJECTS)}"}
    login = Check.of("/login", "POST", None, "192.0.2.1", attributes=user)
    checked = 0
    go = asyncio.Event()

    async def guess(gate: Gate) -> bool:
        nonlocal checked
        opened = await gate.holds.open(login)
        if opened.hold is None:
            return False
        checked += 1
        await go.wait()
        await gate.holds.settle(opened.hold, 1)
        return True

    guesses = [asyncio.ensure_future(guess(gates[number % len(gates)])) for number in range(50)]
    pending = set(guesses)
    while len(pending) > 5:
        _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    # On a cluster they still reserve a unit of the tier's limit, on another server.
    while checked < 5:
        await asyncio.sleep(0.01)
    assert checked == 5
    go.set()
    assert sum(await asyncio.gather(*guesses)) == 5
    for gate in gates:
        denied = await gate.check(login)
        assert not denied.allowed
        assert 0 < (denied.retry_after_us or 0) <= 60_000_000
    other = Check.of("/login", "POST", None, "192.0.2.1", attributes={"user": f"u{next(SUBJECTS)}"})
    opened = await gates[0].holds.open(other)
    assert (await gates[-1].holds.settle(opened.hold, 0, success=True)).remaining == 5
    assert not (await gates[0].check(login)).allowed
    usage = await gates[0].usage(ip="192.0.2.1", attributes=user)
    assert [each.windows[0].remaining for each in usage.rules if each.rule == "/login"] == [0]
    assert await gates[0].reset(subject=f"user={user['user']}")
    assert (await gates[-1].holds.open(login)).decision.remaining == 4


async def check_guesses(*urls: str) -> None:
    gates = [gate_on(url) for url in urls]
    try:
        async with asyncio.timeout(PATIENCE_S):
            await guess_in_parallel(gates)
    finally:
        for gate in gates:
            await gate.close()


async def test_parallel_guesses_at_two_instances(redis_server: RedisServer) -> None:
    await check_guesses(redis_server.url, redis_server.url)


async def test_parallel_guesses_on_a_cluster(redis_cluster: RedisCluster) -> None:
    await check_guesses(redis_cluster.url)
