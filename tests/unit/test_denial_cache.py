"""Denial memory: denies what the store would deny, until the moment it would not, and is bounded."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import Clock
from tests.cpu_time import assert_growth_below, cpu_s
from tidegate.counters.denial_cache import DenialCache
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Decision
from tidegate.policy.limits import Algorithm, Limit, LimitSet

LIMITS = LimitSet("l", Algorithm.SLIDING_WINDOW, [Limit.parse("3/minute")])
COUNTERS = ((LIMITS, "s"),)


def denial(retry_us: int | None = 1_000_000, reset_us: int = 5_000_000) -> Decision:
    return Decision(False, LIMITS.limits[0], 0, reset_us, retry_us, 77_000_000, LIMITS)


def test_it_denies_until_the_time_and_not_longer() -> None:
    memory = DenialCache()
    memory.remember(COUNTERS, 1, denial(), started_us=10_000_000)
    answer = memory.find(COUNTERS, 1, 10_400_000)
    assert answer is not None
    assert not answer.allowed
    assert (answer.retry_after_us, answer.reset_after_us, answer.at_us) == (600_000, 4_600_000, 77_400_000)
    assert answer.holds_until_us == 78_000_000
    assert memory.find(COUNTERS, 1, 10_999_999) is not None
    assert memory.find(COUNTERS, 2, 10_500_000) is None, "more than was denied passes later, or never"
    assert memory.find(COUNTERS, 0, 10_500_000) is None, "a peek is never denied"
    assert memory.find(((LIMITS, "other"),), 1, 10_500_000) is None
    assert memory.find(COUNTERS, 1, 11_000_000) is None
    assert len(memory) == 0
    assert memory.answered == 2


def test_another_cost_is_asked_about_and_a_new_limit_set_too() -> None:
    memory = DenialCache()
    memory.remember(COUNTERS, 5, denial(), 0)
    assert memory.find(COUNTERS, 4, 1) is None
    assert memory.find(COUNTERS, 6, 1) is None
    assert memory.find(COUNTERS, 5, 1) is not None
    memory.remember(COUNTERS, 4, denial(500_000), 0)
    assert [each and each.retry_after_us for each in (memory.find(COUNTERS, cost, 1) for cost in (4, 5))] == [499_999, 999_999]
    raised = LimitSet("l", Algorithm.SLIDING_WINDOW, [Limit.parse("100/minute")])
    assert memory.find(((raised, "s"),), 5, 1) is None
    memory.clear()
    assert memory.find(COUNTERS, 5, 1) is None


def test_where_others_may_give_back_the_store_is_asked_less_and_less_often_until_the_retry() -> None:
    memory, now, asked = DenialCache(), 0, []
    while now < 60_000_000:
        if memory.find(COUNTERS, 1, now) is None:
            asked.append(now // 1_000_000)
            memory.remember(COUNTERS, 1, denial(retry_us=60_000_000 - now), now, ttl_us=5_000_000)
        now += 1_000_000
    assert asked == [0, 5, 15, 35]
    assert memory.find(COUNTERS, 1, now) is None
    memory.remember(COUNTERS, 1, denial(retry_us=60_000_000), now, ttl_us=5_000_000)
    assert memory.find(COUNTERS, 1, now + 5_000_000) is None, "in the next window it begins anew"
    assert memory.find(COUNTERS, 1, now + 5_000_000, unanswered=True) is not None


def test_what_never_passes_is_not_remembered() -> None:
    memory = DenialCache()
    memory.remember(COUNTERS, 5, denial(retry_us=None), 0)
    assert len(memory) == 0


def test_it_is_bounded_and_swept() -> None:
    memory = DenialCache(max_entries=10)
    for number in range(25):
        memory.remember(((LIMITS, f"s{number}"),), 1, denial(1000 * (number + 1)), 0)
    assert len(memory) == 10
    assert memory.find(((LIMITS, "s14"),), 1, 0) is None
    assert memory.find(((LIMITS, "s15"),), 1, 0) is not None
    memory.sweep(20_000)
    assert len(memory) == 5


def test_a_denial_at_the_bound_costs_the_same_whatever_the_bound() -> None:
    def seconds(most: int, new: int = 60_000) -> float:
        memory, decision = DenialCache(most), denial(3_600_000_000)
        keys = [((LIMITS, f"s{number}"),) for number in range(most + new)]
        for key in keys[:most]:
            memory.remember(key, 1, decision, 0)

        def work() -> None:
            for key in keys[most:]:
                memory.remember(key, 1, decision, 0)

        return cpu_s(work)

    # Evictions that search for the oldest entry make it more than 20 times as much.
    assert_growth_below(10, seconds, 100, 100_000)


def test_a_sweep_examines_a_bounded_number_and_comes_round() -> None:
    memory = DenialCache()
    for number in range(50):
        memory.remember(((LIMITS, f"s{number}"),), 1, denial(1_000 if number >= 40 else 1_000_000), 0)
    lengths = []
    for _ in range(5):
        memory.sweep(500_000, steps=10)
        lengths.append(len(memory))
    assert lengths == [50, 50, 50, 50, 40]


@settings(max_examples=200)
@given(
    st.sampled_from(list(Algorithm)),
    st.lists(st.tuples(st.integers(0, 9_000_000), st.integers(0, 4)), min_size=1, max_size=40),
    st.integers(0, 3_000),
)
def test_it_never_denies_what_the_store_would_allow(algorithm: Algorithm, steps: list[tuple[int, int]], delay_us: int) -> None:
    """The store answers `delay_us` after it was asked; the memory counts from before."""
    clock = Clock()
    store = MemoryCounters(clock=clock)
    limits = LimitSet("l", algorithm, [Limit.parse("4/7s"), Limit.parse("9/minute")])
    counters = ((limits, "s"),)
    memory = DenialCache()
    for advance, cost in steps:
        clock.now_us += advance
        remembered = memory.find(counters, cost, clock.now_us)
        if remembered is not None:
            truth = store.charge_all(counters, cost)
            assert cost
            assert not truth.allowed
            # Who was admitted since may have made it later.
            assert remembered.retry_after_us is not None
            assert truth.retry_after_us is not None
            assert remembered.retry_after_us <= truth.retry_after_us
            continue
        started_us = clock.now_us
        clock.now_us += delay_us
        decision = store.charge_all(counters, cost)
        if not decision.allowed:
            memory.remember(counters, cost, decision, started_us)
