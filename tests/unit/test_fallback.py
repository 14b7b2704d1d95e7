"""Shares of one instance: all together never above the limit, and all that was admitted is owed."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import MOMENT_US, Clock
from tests.cpu_time import assert_growth_below, cpu_s
from tidegate.algorithms import MERGE
from tidegate.counters import Charge
from tidegate.counters.fallback import LocalShares, share_of
from tidegate.counters.memory import MemoryCounters
from tidegate.errors import PolicyError
from tidegate.policy.limits import Algorithm, Limit, LimitSet


def limit_set(algorithm: Algorithm, *texts: str) -> LimitSet:
    return LimitSet("l", algorithm, [Limit.parse(text) for text in texts])


@given(
    st.sampled_from(list(Algorithm)),
    st.integers(1, 100_000),
    st.integers(1, 60),
    st.sampled_from(["s", "7s", "min", "day", "month"]),
)
def test_a_share_is_countable_and_shares_stay_within_the_limit(
    algorithm: Algorithm, amount: int, instances: int, unit: str
) -> None:
    try:
        limits = limit_set(algorithm, f"{amount}/{unit}")
    except PolicyError:
        return  # a bucket that cannot be counted exactly is refused as a policy
    share = share_of(limits.limits[0], instances, limits)
    assert share.window_name == limits.limits[0].window_name
    assert share.amount >= 1
    assert share.amount * instances <= max(amount, instances)
    assert share.capacity * instances <= max(limits.limits[0].capacity, instances)
    if not algorithm.is_bucket:
        assert share.amount == max(amount // instances, 1)


@settings(max_examples=100)
@given(
    st.sampled_from(list(Algorithm)), st.integers(1, 5), st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), max_size=60)
)
def test_instances_together_admit_at_most_the_limit(algorithm: Algorithm, instances: int, asked: list[tuple[int, int]]) -> None:
    limits = limit_set(algorithm, "20/minute burst 20" if algorithm.is_bucket else "20/minute")
    clock = Clock()
    shares = [LocalShares(1000, clock) for _ in range(instances)]
    charge = {cost: Charge(((limits, "s"),), cost) for cost in (1, 2, 3)}
    admitted = 0
    for instance, cost in asked:
        decision = shares[instance % instances].charge(charge[cost], instances)
        assert decision.degraded
        assert decision.binding is limits.limits[0]
        admitted += cost * decision.allowed
    assert admitted <= 20
    # Put together, they say exactly what was admitted.
    merged = None
    for share in shares:
        owed = share.owes(limits, "s")
        states = share.take(limits, "s")
        assert (states is not None) == owed
        if states is not None:
            merged = MERGE[algorithm](limits.limits[0], merged, states[0])
        assert not share.owed
        assert share.take(limits, "s") is None
    store = MemoryCounters(clock=clock)
    if merged is not None:
        store.add(limits, "s", (merged,))
    left = store.charge_one(limits, "s", 0).remaining
    assert left is not None
    # A bucket's level is rounded up to whole tokens where shares drained at another rate.
    assert 0 <= 20 - admitted - left <= (instances if algorithm.is_bucket else 0)


def test_what_could_not_be_put_back_is_owed_again() -> None:
    limits = limit_set(Algorithm.SLIDING_WINDOW, "10/minute", "100/day")
    clock = Clock()
    shares = LocalShares(1000, clock)
    for _ in range(3):
        shares.charge(Charge(((limits, "s"),)), 2)
    states = shares.take(limits, "s")
    assert states is not None
    shares.charge(Charge(((limits, "s"),)), 2)
    shares.give_back(limits, "s", states)
    assert list(shares.debts()) == [(limits, "s")]
    assert shares.charge(Charge(((limits, "s"),), 0), 2).remaining == 1
    again = shares.take(limits, "s")
    assert again is not None
    assert [state[1] for state in again if state is not None] == [4, 4]


def test_a_bucket_that_was_refunded_drains_as_the_share_it_was() -> None:
    limits = limit_set(Algorithm.TOKEN_BUCKET, "60/minute burst 4")
    clock = Clock()
    shares, untouched = LocalShares(1000, clock), LocalShares(1000, clock)
    for each in (shares, untouched):
        assert [each.charge(Charge(((limits, "s"),)), 4).allowed for _ in range(2)] == [True, False]
    states = shares.take(limits, "s")
    assert states is not None
    shares.give_back(limits, "s", states)
    clock.advance(3.9)
    for each in (shares, untouched):
        assert not each.charge(Charge(((limits, "s"),)), 4).allowed, "a quarter of one a second"
    assert shares.take(limits, "s") == untouched.take(limits, "s")


def test_what_no_longer_counts_is_not_owed() -> None:
    limits = limit_set(Algorithm.FIXED_WINDOW, "10/minute")
    clock = Clock(MOMENT_US)
    shares = LocalShares(1000, clock)
    shares.charge(Charge(((limits, "s"),)), 1)
    clock.advance(60)
    assert shares.take(limits, "s") is None


def test_debts_are_bounded() -> None:
    limits = limit_set(Algorithm.FIXED_WINDOW, "10/minute")
    shares = LocalShares(50, Clock())
    for number in range(500):
        shares.charge(Charge(((limits, f"s{number}"),)), 1)
    assert len(shares.owed) == 50


def test_debts_leave_at_the_front_at_the_same_cost_however_many_left_before() -> None:
    limits = limit_set(Algorithm.FIXED_WINDOW, "10/minute")

    def seconds_each(debts: int) -> float:
        shares = LocalShares(1_000_000, Clock())
        for number in range(debts):
            shares.owed["l", Algorithm.FIXED_WINDOW, f"s{number}"] = limits

        def work() -> None:
            for _ in range(debts):
                shares.take(*next(shares.debts()))

        return cpu_s(work) / debts

    # Where finding the first one walks the gaps that the others left, it is about 20 times as much.
    assert_growth_below(6, seconds_each, 2_000, 60_000)


def test_a_rule_and_its_tier_share_and_owe_together() -> None:
    rule = limit_set(Algorithm.TOKEN_BUCKET, "60/minute burst 4")
    tier = LimitSet("tier", Algorithm.SLIDING_WINDOW, [Limit.parse("3/day")])
    shares = LocalShares(100, Clock())
    charge = Charge(((rule, "s"), (tier, "s")))
    answers = [shares.charge(charge, 1) for _ in range(4)]
    assert [answer.allowed for answer in answers] == [True, True, True, False]
    assert answers[-1].binding is tier.limits[0]
    assert answers[-1].limits is rule
    assert set(shares.debts()) == {(rule, "s"), (tier, "s")}


def test_a_debt_is_known_by_the_limits_of_a_tier_that_was_read_anew() -> None:
    shares = LocalShares(100, Clock())
    before, after = (limit_set(Algorithm.FIXED_WINDOW, *texts) for texts in (["10/minute"], ["20/minute", "50/hour"]))
    shares.charge(Charge(((before, "s"),), 3), 2)
    assert shares.owes(after, "s")
    assert not shares.owes(after, "t")
    assert not shares.owes(limit_set(Algorithm.SLIDING_LOG, "10/minute"), "s"), "another algorithm is another counter"
    states = shares.take(after, "s")
    assert states is not None
    assert [state and state[1] for state in states] == [3, 0]
    assert not shares.owes(before, "s")
    assert shares.take(before, "s") is None
