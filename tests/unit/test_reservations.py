"""Reservations in memory: held against whole histories, first come, first served, given back on cancel."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import MOMENT_US, Clock
from tidegate.algorithms import DECIDE
from tidegate.algorithms.reservations import RESERVABLE
from tidegate.counters.memory import MemoryCounters
from tidegate.policy.limits import Algorithm, Limit, LimitSet

TEXTS = ("5/10s", "3/second", "7/minute", "4/month")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["check", "reserve", "reserve", "cancel"]),
        st.one_of(st.just(0), st.integers(0, 400_000), st.integers(0, 12_000_000), st.sampled_from([10_000_000, 60_000_000])),
        st.integers(1, 4),
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=25,
)


def limits_of(algorithm: Algorithm, *texts: str) -> LimitSet:
    burst = " burst 4" if algorithm.is_bucket else ""
    return LimitSet("r", algorithm, [Limit.parse(text + burst) for text in texts])


def admitted_by(limits: LimitSet, history: list[tuple[int, int]]) -> bool:
    """Whether the algorithm alone, asked at the moments at which callers went, admits all of them."""
    states: list[Any] = [None] * len(limits.limits)
    decide = DECIDE[limits.algorithm]
    for moment, cost in sorted(history, key=lambda each: each[0]):
        states = [decide(limit, state, moment, cost)[0] for limit, state in zip(limits.limits, states, strict=True)]
        if None in states:
            return False
    return True


@pytest.mark.parametrize("algorithm", sorted(each for each in RESERVABLE if each.is_bucket))
def test_places_in_front_of_others_give_nothing_back(algorithm: Algorithm) -> None:
    """Those behind pass at moments that were computed with them."""
    limits = limits_of(algorithm, "7/minute")
    memory = MemoryCounters(clock=Clock(MOMENT_US))
    counters = ((limits, "s"),)

    def reserve(cost: int) -> Any:
        return asyncio.run(memory.reserve(counters, cost, 100_000_000))

    assert memory.charge_all(counters, 3).allowed
    second, third = reserve(3), reserve(3)
    asyncio.run(memory.release(second))
    fourth = reserve(2)
    asyncio.run(memory.release(third))
    fifth = reserve(4)
    assert admitted_by(limits, [(MOMENT_US, 3), (fourth.at_us, 2), (fifth.at_us, 4)])
    asyncio.run(memory.release(fifth))
    assert reserve(4).at_us == fifth.at_us, "the last place is given back whole"


@pytest.mark.parametrize("algorithm", sorted(RESERVABLE))
def test_no_history_admits_more_than_the_limits(algorithm: Algorithm) -> None:
    @given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=2, unique=True), STEPS, st.integers(0, 9_999_999))
    def hold(texts: list[str], steps: list[tuple[str, int, int, int]], into: int) -> None:
        limits = limits_of(algorithm, *texts)
        clock = Clock(MOMENT_US - MOMENT_US % 60_000_000 + into)
        memory = MemoryCounters(clock=clock)
        counters = ((limits, "s"),)
        went: list[tuple[int, int]] = []
        waiting: list[Any] = []
        cancelled = False  # what is given back may be had before the moments of those behind
        for what, step, cost, which in steps:
            clock.now_us += step
            went += [(each.at_us, each.cost) for each in waiting if each.at_us <= clock.now_us]
            waiting = [each for each in waiting if each.at_us > clock.now_us]
            if what == "check":
                if memory.charge_all(counters, cost).allowed:
                    assert cancelled or not waiting, "nobody goes before who asked first"
                    went.append((clock.now_us, cost))
            elif what == "reserve":
                place = asyncio.run(memory.reserve(counters, cost, 100_000_000))
                if place.allowed:
                    assert place.at_us >= clock.now_us
                    assert cancelled or place.at_us >= max([0, *(each.at_us for each in waiting)])
                    waiting.append(place)
                else:
                    assert place.decision.retry_after_us is None or place.decision.retry_after_us > 100_000_000
            elif waiting:
                cancelled = True
                asyncio.run(memory.release(waiting.pop(which % len(waiting))))
        went += [(each.at_us, each.cost) for each in waiting]
        assert admitted_by(limits, went)

    hold()
