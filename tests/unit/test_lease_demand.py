"""How much of a subject is leased, and for how long, by how often it is checked; and units that come free later."""

from __future__ import annotations

import pytest

from tests.model.lease_store import LeaseStore
from tidegate.counters import Charge, Counters, GrantingDecision
from tidegate.counters.lease_demand import LeaseDemand
from tidegate.counters.lease_table import LeaseTable
from tidegate.policy.limits import Algorithm, Limit, LimitSet

TTL_US = 5_000_000
MINUTE_US = 60_000_000
START_US = 1_700_000_000_000_000 // MINUTE_US * MINUTE_US


def counters(algorithm: Algorithm = Algorithm.FIXED_WINDOW, subject: str = "s") -> Counters:
    return ((LimitSet("l", algorithm, [Limit.parse("1000/minute")]), subject),)


def checked(pause_us: int, times: int = 2, of: Counters | None = None) -> tuple[LeaseDemand, Counters, int]:
    """Demand after some checks at a pace, and the moment of the next one."""
    demand, of = LeaseDemand(TTL_US, 100), of or counters()
    for number in range(times):
        demand.answered(of, number * pause_us)
    return demand, of, times * pause_us


def test_the_first_check_leases_nothing() -> None:
    demand, of, now_us = checked(1_000, times=0)
    assert demand.wish(of, 1, now_us) is None
    demand.answered(of, now_us)
    wish = demand.wish(of, 1, now_us + 1_000)
    assert wish is not None
    assert (wish.units, wish.life_us, wish.slow) == (8, TTL_US, False)


@pytest.mark.parametrize(("pause_us", "life_us", "units"), [(1_000_000, 16_000_000, 16), (10_000_000, 60_000_000, 6)])
def test_a_slow_subject_is_leased_for_longer(pause_us: int, life_us: int, units: int) -> None:
    demand, of, now_us = checked(pause_us)
    wish = demand.wish(of, 1, now_us)
    assert wish is not None
    assert (wish.units, wish.life_us, wish.slow) == (units, life_us, True)
    assert wish.idle_us >= 6 * pause_us


def test_buckets_are_not_leased_for_longer() -> None:
    demand, of, now_us = checked(1_000_000, of=counters(Algorithm.TOKEN_BUCKET))
    wish = demand.wish(of, 1, now_us)
    assert wish is not None
    assert (wish.life_us, wish.slow) == (TTL_US, False)


def test_a_subject_that_is_too_rare_is_not_leased() -> None:
    demand, of, now_us = checked(21_000_000)
    assert demand.wish(of, 1, now_us) is None


def test_what_ran_out_early_grows_to_what_was_needed_and_what_was_left_shrinks() -> None:
    demand, of, now_us = checked(1_000)
    demand.ran_out(of, 8, 1_000_000, now_us)
    wish = demand.wish(of, 1, now_us)
    assert wish is not None
    assert wish.units == 40, "8 in a second are 40 in a lease life"
    demand.ran_out(of, 40, 1_000, now_us)
    wish = demand.wish(of, 1, now_us)
    assert wish is not None
    assert wish.units == 320, "eight times as much at most"
    demand.left_over(of, 320, 200, TTL_US, now_us)
    wish = demand.wish(of, 1, now_us)
    assert wish is not None
    assert wish.units == 200


class Ahead:
    """An instance whose subject has reached a sliding limit of 60 a minute: a unit comes free each second."""

    def __init__(self) -> None:
        self.now_us = START_US
        self.store = LeaseStore(lambda: self.now_us)
        self.limits = LimitSet("l", Algorithm.SLIDING_WINDOW, [Limit.parse("60/minute")])
        self.counters: Counters = ((self.limits, "s"),)
        self.table = LeaseTable(TTL_US, 10, lambda: (self.now_us - START_US) * 1000 + 1)
        self.store.charge(Charge(self.counters, 60))
        self.now_us += MINUTE_US
        self.calls = 0

    def check(self) -> bool:
        decision = self.table.take(self.counters, 1)
        if decision is None:
            sent_ns = (self.now_us - START_US) * 1000 + 1
            request = self.table.request(self.counters, 1, sent_ns)
            decision = self.store.charge(Charge(self.counters, 1, request))
            self.calls += 1
            self.table.answered(self.counters)
            if request is not None:
                self.table.accept(self.counters, request, decision, sent_ns, "session")
        return decision.allowed


def test_units_that_come_free_later_are_leased_and_used_when_they_are_free() -> None:
    made, exact = Ahead(), LeaseStore(lambda: made.now_us)
    exact.states = dict(made.store.states)
    allowed = 0
    for _ in range(200):
        made.now_us += 100_000
        passes = made.check()
        assert passes <= exact.charge(Charge(made.counters)).allowed, "never before an exact limiter would admit it"
        allowed += passes
    assert made.table.decisions >= 12, "most units are used without a call"
    assert 17 <= allowed <= 20


def test_another_instance_is_denied_what_was_leased_ahead() -> None:
    made = Ahead()
    while not made.table.leases:
        made.now_us += 100_000
        made.check()
    [lease] = made.table.leases.values()
    assert lease.ahead is not None
    denied = made.store.charge(Charge(made.counters))
    assert not denied.allowed
    assert denied.retry_after_us is not None
    assert denied.retry_after_us > lease.left * 1_000_000 - 1_000_000, "only when those units are free and one more is"
    assert made.table.unused(made.limits, "s") == 0, "units that are not free are not left to anybody"


def test_a_denied_check_brings_the_lease() -> None:
    made = Ahead()
    outcomes = []
    for _ in range(30):
        made.now_us += 100_000
        sent_ns = (made.now_us - START_US) * 1000 + 1
        request = made.table.request(made.counters, 1, sent_ns)
        outcomes.append(made.store.charge(Charge(made.counters, 1, request)))
        made.table.answered(made.counters)
        if request is not None:
            made.table._forget_request(made.counters)
    granting = [each for each in outcomes if isinstance(each, GrantingDecision)]
    assert granting
    assert all(each.ahead is not None and each.following is not None and not each.following.allowed for each in granting)
