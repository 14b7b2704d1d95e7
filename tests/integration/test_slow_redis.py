"""A slow Redis is not a dead one: late answers are read, nothing is admitted above a limit, and its breaker stays closed."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

import pytest
from drills.redis_failures import slow_answers

from tests.moments import PATIENCE_S, until
from tests.servers.redis_server import RedisServer
from tests.servers.tcp_proxy import TcpProxy
from tidegate.breaker import BreakerOptions, BreakerState
from tidegate.counters import Charge, ChargeOutcome
from tidegate.counters.degraded import GuardOptions
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import Algorithm, Limit, LimitSet, OnFailure

NAMES = iter(range(1_000_000))


def limit_set(text: str = "100/day", on_failure: OnFailure = OnFailure.LOCAL) -> LimitSet:
    return LimitSet(f"slow:{next(NAMES)}", Algorithm.FIXED_WINDOW, [Limit.parse(text)], on_failure)


async def ask(counters: GuardedCounters, limits: LimitSet, cost: int = 1) -> ChargeOutcome:
    return (await counters.charge([Charge(((limits, "s"),), cost)]))[0]


async def decided(counters: GuardedCounters, limits: LimitSet, cost: int = 1) -> Decision:
    outcome = await ask(counters, limits, cost)
    assert isinstance(outcome, Decision), outcome
    return outcome


async def answered(counters: GuardedCounters) -> None:
    await until(lambda: not len(counters.late))


async def test_a_late_denial_is_remembered(redis_server: RedisServer) -> None:
    async with TcpProxy(redis_server.port) as proxy:
        counters = GuardedCounters(RedisCounters(proxy.url, 0.1))
        other = GuardedCounters(RedisCounters(redis_server.url, 5.0))
        await counters.start()
        await other.start()
        limits = limit_set()
        # Another instance uses all of it, so that this one cannot know.
        assert (await decided(other, limits, 100)).allowed
        proxy.stall = True
        first = await decided(counters, limits)
        assert (first.allowed, first.degraded) == (True, True)
        proxy.stall = False
        await answered(counters)
        assert counters.late.answers["denied"] == 1
        proxy.stall = True
        again = await decided(counters, limits)
        assert (again.allowed, again.degraded) == (False, False), "as the store said"
        proxy.stall = False
        # What was admitted is counted, above the limit.
        roomy = LimitSet(limits.name, limits.algorithm, [Limit.parse("1000/day")])
        async with asyncio.timeout(60):
            while (await decided(other, roomy, 0)).remaining != 899:
                await asyncio.sleep(0.02)
        assert not counters.owed
        await counters.close()
        await other.close()


@pytest.mark.parametrize("on_failure", [OnFailure.LOCAL, OnFailure.DENY])
async def test_what_was_charged_late_for_a_check_that_was_denied_serves_the_next_one(
    redis_server: RedisServer, on_failure: OnFailure
) -> None:
    async with TcpProxy(redis_server.port) as proxy:
        counters = GuardedCounters(RedisCounters(proxy.url, 0.1))
        await counters.start()
        limits = limit_set("4/day", on_failure)
        assert (await decided(counters, limits)).allowed
        proxy.stall = True
        outcomes = await asyncio.gather(*(ask(counters, limits) for _ in range(5)))
        admitted = [outcome for outcome in outcomes if isinstance(outcome, Decision) and outcome.allowed]
        proxy.stall = False
        await answered(counters)
        assert counters.late.answers == {"allowed": 3, "denied": 2, "lost": 0}
        proxy.stall = True
        paid = [await decided(counters, limits) for _ in range(3)]
        assert sum(each.allowed for each in paid) + len(admitted) == 3, "never more than the limit, and not less"
        assert not any(each.degraded for each in paid)
        proxy.stall = False
        await until(lambda: not counters.owed)
        await counters.close()


async def test_one_silence_is_not_five_failures(redis_server: RedisServer) -> None:
    async with TcpProxy(redis_server.port) as proxy:
        counters = GuardedCounters(RedisCounters(proxy.url, 0.05))
        await counters.start()
        limits = limit_set("1000000/day")
        assert (await decided(counters, limits)).allowed
        proxy.stall = True
        asked = []
        for _ in range(60):
            asked.append(asyncio.ensure_future(decided(counters, limits)))
            await asyncio.sleep(0.002)
        await asyncio.gather(*asked)
        proxy.stall = False
        await answered(counters)
        assert counters.degraded.keys() == {"timeout"}
        assert not counters.breakers
        assert not (await decided(counters, limits)).degraded
        await counters.close()


async def test_answers_that_never_come_are_owed_and_open_the_breaker(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    counters = GuardedCounters(RedisCounters(server.url, 0.05), GuardOptions(breaker=BreakerOptions(open_s=3600)))
    await counters.start()
    limits = limit_set("1000000/day")
    assert (await decided(counters, limits)).allowed
    server.pause()
    deadline = time.monotonic() + PATIENCE_S
    while not counters.open_breakers:
        assert time.monotonic() < deadline
        await decided(counters, limits)
    assert counters.late.answers["lost"] > 0
    assert counters.owed == 1
    with pytest.raises(StoreUnavailable, match=r"breaker open|cannot be reached|did not answer"):
        await counters.ping()
    server.resume()
    # No check comes, and open_s is an hour.
    await until(lambda: not counters.open_breakers and not counters.owed)
    await counters.close()


async def test_a_redirection_does_not_double_the_deadline(redis_server: RedisServer) -> None:
    async with TcpProxy(redis_server.port) as proxy:
        store = RedisCounters(proxy.url, 1.5)
        await store.start()
        limits = limit_set()
        charge = Charge(((limits, "s"),))
        await store.charge_one(charge)
        asked: list[float] = []
        proxy.delay_s = 1.0
        proxy.rewrite = lambda piece: b"-NOSCRIPT no\r\n" if not asked.append(0.0) and len(asked) == 1 else piece  # type: ignore[func-returns-value]
        began_ns = time.monotonic_ns()
        with pytest.raises(StoreUnavailable) as caught:
            await store.charge_one(charge, began_ns)
        # The second answer would come after 2 s; by the end of the deadline it is late, and can still be had.
        assert caught.value.details["reason"] == "timeout"
        answer = await asyncio.wait_for(caught.value.answer, PATIENCE_S)  # type: ignore[attr-defined]
        assert answer is not None
        await store.close()


@pytest.mark.parametrize("share", [0.05, 0.5])
async def test_random_delays_admit_nothing_above_the_limits(share: float) -> None:
    random.seed(7)
    result = await slow_answers(share, seconds=5.0, rate=450)
    load = result.load
    assert not load.errors
    assert load.degraded, "nothing was late"
    assert load.over_admitted == 0
    assert load.uncounted == 0
    assert all(not store.breakers for store in load.stores)


async def test_a_redis_that_hangs_opens_its_breaker_and_closes_it_when_it_goes_on(redis_server: RedisServer) -> None:
    """Slow for a second, away after that: checks no longer wait for it, and operators see it."""
    async with TcpProxy(redis_server.port) as proxy:
        counters = GuardedCounters(RedisCounters(proxy.url, 0.1))
        await counters.start()
        limits = limit_set("1000/day")
        await decided(counters, limits)
        proxy.stall = True

        async def opens() -> None:
            while not any(breaker.state is BreakerState.OPEN for breaker in counters.breakers.values()):
                await decided(counters, limits)
                await asyncio.sleep(0.01)

        await asyncio.wait_for(opens(), 60)
        # At most one call each 10 ms for as long as a lost connection may take to come back, and five failures.
        assert counters.degraded["disconnected"] < 100
        assert (await decided(counters, limits)).degraded
        proxy.stall = False
        await until(lambda: all(breaker.state is BreakerState.CLOSED for breaker in counters.breakers.values()))
        await counters.close()
