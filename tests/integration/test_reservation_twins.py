"""Reservations in Lua do step for step what they do in memory, on real servers; the clock is an argument."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import MOMENT_US, Clock
from tests.integration.test_lua_twins import ADVANCES, CLOCK_BY_ARGUMENT, COSTS, asked, in_lua, limit_set, limit_texts, outcome
from tests.servers.ports import free_port
from tests.servers.redis_server import RedisServer
from tidegate import Limiter, SyncLimiter
from tidegate.algorithms import DECIDE
from tidegate.algorithms.reservations import RESERVABLE
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.redis.scripts import parameters, script, wire_states
from tidegate.counters.reservations import Reservation
from tidegate.policy.limits import Algorithm

KEYS = itertools.count()
HELD = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["charge", "reserve", "reserve", "reserve", "release", "absorb"]),
        st.one_of(st.just(0), ADVANCES),
        COSTS,
        st.one_of(st.integers(0, 200_000_000), st.just(400 * 86_400_000_000)),
    ),
    min_size=1,
    max_size=20,
)


@pytest.mark.parametrize("algorithm", sorted(RESERVABLE - {Algorithm.LEAKY_BUCKET}))  # which is the token bucket in Lua
def test_one_counter(redis_server: RedisServer, algorithm: Algorithm) -> None:
    scripts = {
        work: script(work, frozenset((algorithm,)), CLOCK_BY_ARGUMENT) for work in ("charge", "reserve", "release", "absorb")
    }

    @HELD
    @given(limit_texts(algorithm), STEPS, st.integers(0, 20_000_000))
    def hold(texts: list[str], steps: list[tuple[str, int, int, int]], into: int) -> None:
        limits, key = limit_set(algorithm, texts), f"reserved:{next(KEYS)}"
        clock = Clock(MOMENT_US + into)
        memory = MemoryCounters(clock=clock)
        counters = ((limits, "s"),)
        places: list[Reservation] = []
        for what, advance, cost, ahead in steps:
            clock.now_us += advance
            now = clock.now_us
            if what == "reserve":
                reply = asked(redis_server, scripts[what], [key], parameters(limits), cost, ahead, now)
                place = asyncio.run(memory.reserve(counters, cost, ahead))
                assert (*in_lua(reply[:5], [limits]), reply[5]) == (*outcome(place.decision), place.at_us), (limits, cost)
                if place.allowed and cost:
                    places.append(place)
            elif what == "release" and places:
                place = places.pop(cost % len(places))
                arguments = (place.cost, place.decision.at_us, place.at_us)
                reply = asked(redis_server, scripts[what], [key, f"{key}:reset"], parameters(limits), *arguments, now)
                assert (reply == len(limits.limits)) == asyncio.run(memory.release(place))
            elif what == "absorb":
                states = [DECIDE[algorithm](limit, None, now, min(2, limit.capacity))[0] for limit in limits.limits]
                memory.add(limits, "s", states)
                asked(redis_server, scripts[what], [key], parameters(limits), wire_states(limits, states), now)
            reply = asked(redis_server, scripts["charge"], [key], parameters(limits), cost * (what == "charge"), now)
            assert in_lua(reply, [limits]) == outcome(memory.charge_one(limits, "s", cost * (what == "charge")))

    hold()


async def test_callers_of_several_instances_go_in_the_order_of_asking(redis_server: RedisServer) -> None:
    redis_server.must("FLUSHALL")
    limiters = [Limiter("200/second burst 1", algorithm="token_bucket", name="wait", counters=redis_server.url) for _ in range(3)]
    # Connected before: a first call takes longer, and may be past the deadline of a check.
    for each in limiters:
        await each.reserve("another", at_most_s=60)
    calls = sum(each.counters.guarded.store_calls for each in limiters)  # type: ignore[attr-defined]
    places = [await limiters[number % 3].reserve("job", at_most_s=600) for number in range(30)]
    moments = [each.at_us for each in places]
    assert moments == sorted(set(moments)), "each goes after all that asked before, whichever instance it asked"
    jobs = [limiters[number % 3].wait("job", at_most_s=600) for number in range(30)]
    assert all(each.allowed for each in await asyncio.gather(*jobs))
    sent = sum(each.counters.guarded.store_calls for each in limiters) - calls  # type: ignore[attr-defined]
    assert sent == 60, "one call for each that passed"
    last = await limiters[0].reserve("job", at_most_s=600)
    assert last.at_us - moments[0] >= 60 * 5_000, "5 ms for each of those before"
    for each in limiters:
        await each.close()


async def test_a_caller_who_is_cancelled_gives_its_place_back(redis_server: RedisServer) -> None:
    redis_server.must("FLUSHALL")
    async with Limiter("1/hour burst 1", algorithm="token_bucket", name="cancel", counters=redis_server.url) as limiter:
        assert (await limiter.reserve("job", at_most_s=0)).allowed
        before = (await limiter.reserve("job", at_most_s=0)).decision.retry_after_us
        waiting = asyncio.ensure_future(limiter.wait("job", at_most_s=36_000))
        await asyncio.sleep(0)
        waiting.cancel()  # its call is on the way
        with pytest.raises(asyncio.CancelledError):
            await waiting
        after = (await limiter.reserve("job", at_most_s=0)).decision.retry_after_us
        assert before is not None
        assert after is not None
        assert after <= before, "as if it had never asked"
        with SyncLimiter("1/hour burst 1", algorithm="token_bucket", name="cancel", counters=redis_server.url) as blocking:
            place = blocking.reserve("job", at_most_s=36_000)
            assert place.allowed
            behind = await limiter.reserve("job", at_most_s=36_000)
            assert (behind.at - place.at).total_seconds() == 3600
            assert await limiter.cancel(behind)
            assert blocking.cancel(place)


def test_without_redis_the_fallback_decides_whether_the_caller_may_go_now() -> None:
    with SyncLimiter("3/hour", counters=f"redis://127.0.0.1:{free_port()}") as limiter:
        outcomes = [limiter.wait("job", at_most_s=0.01) for _ in range(4)]
    assert [each.allowed for each in outcomes] == [True, True, True, False]
    assert all(each.degraded for each in outcomes)
