"""Crossed thresholds in memory: for each limit of a charge, whatever algorithm, exactly once while use only rises."""

from __future__ import annotations

import pytest

from tidegate.counters.crossings import Crossing, CrossingWatch
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.watched import WatchedSet
from tidegate.notifications.events import crossing_key, threshold_event, window_of
from tidegate.policy.limits import Algorithm, ConcurrencyAlgorithm, Limit, LimitSet
from tidegate.policy.periods import PeriodAnchor
from tidegate.policy.quotas import CompiledQuotas, Overage, Quota

START_US = 1_700_006_400_000_000


class Clock:
    now_us = START_US

    def __call__(self) -> int:
        return self.now_us


def _counters(*percents: int) -> tuple[MemoryCounters, Clock, list[Crossing]]:
    clock, found = Clock(), list[Crossing]()
    counters = MemoryCounters(clock=clock)
    counters.watch = CrossingWatch(lambda limits, limit: percents if limits.tier else (), found.append)
    return counters, clock, found


def _limits(algorithm: Algorithm, *texts: str, name: str = "pro:a", soft: bool = False) -> LimitSet:
    return LimitSet(name, algorithm, [Limit.parse(text) for text in texts], rule="a", tier="pro", soft=soft)


def _seen(found: list[Crossing]) -> list[tuple[str, int, int]]:
    return [(each.limit.text, each.percent, each.used) for each in found]


@pytest.mark.parametrize("algorithm", [each for each in Algorithm if each is not Algorithm.LEAKY_BUCKET])
def test_each_threshold_of_each_limit_is_found_once(algorithm: Algorithm) -> None:
    counters, _, found = _counters(80, 100)
    limits = _limits(algorithm, "10/minute", "15/hour")
    for cost in (7, 1, 0, 1, 3, 1, 1):
        counters.charge_all(((limits, "k:1"),), cost)
    minute, hour = (limit.text for limit in limits.limits)
    assert _seen(found) == [(minute, 80, 8), (minute, 100, 10)], "8 of 15 are 53 %"
    counters.charge_all(((limits, "k:2"),), 10)
    assert [(each.limit.text, each.percent, each.subject) for each in found[2:]] == [(minute, 80, "k:2"), (minute, 100, "k:2")]
    assert hour not in {each.limit.text for each in found}


def test_all_counters_of_a_check_are_watched_not_the_binding_one_alone() -> None:
    counters, _, found = _counters(50)
    rule, tier = _limits(Algorithm.FIXED_WINDOW, "10/minute"), _limits(Algorithm.SLIDING_WINDOW, "100/hour", name="pro")
    other = LimitSet("other", Algorithm.FIXED_WINDOW, [Limit.parse("2/minute")])
    counters.charge_all(((rule, "k:1"), (tier, "c:1"), (other, "k:1")), 1)
    counters.charge_all(((tier, "c:1"),), 48)
    assert found == []
    counters.charge_all(((rule, "k:1"), (tier, "c:1")), 4)
    assert [(each.subject, each.used) for each in found] == [("k:1", 5), ("c:1", 53)]


def test_a_denied_check_and_a_peek_cross_nothing() -> None:
    counters, _, found = _counters(10)
    narrow, wide = _limits(Algorithm.FIXED_WINDOW, "1/minute"), _limits(Algorithm.FIXED_WINDOW, "100/minute", name="pro")
    for cost in (0, 50):
        counters.charge_all(((narrow, "k:1"), (wide, "k:1")), cost)
    assert found == []


def test_soft_limits_and_overage() -> None:
    counters, _, found = _counters(100)
    soft = _limits(Algorithm.FIXED_WINDOW, "2/minute", soft=True)
    for _ in range(4):
        assert counters.charge_all(((soft, "k:1"),), 1).allowed
    assert _seen(found) == [("2/minute", 100, 2)]
    found.clear()
    over = CompiledQuotas((Quota.parse("10/month"),), Overage(), None, "pro").of(PeriodAnchor())
    for cost in (9, 3, 1):
        counters.charge_all(((over, "c:1"),), cost)
    assert _seen(found) == [("10/month", 100, 12)]


def test_a_new_window_is_another_event_and_a_second_crossing_of_the_same_window_is_not() -> None:
    counters, clock, found = _counters(100)
    bucket = _limits(Algorithm.TOKEN_BUCKET, "60/minute")
    counters.charge_all(((bucket, "k:1"),), 60)
    clock.now_us += 1_000_000
    counters.charge_all(((bucket, "k:1"),), 1)
    clock.now_us += 60_000_000
    counters.charge_all(((bucket, "k:1"),), 60)
    first, again, later = map(crossing_key, found)
    assert first == again != later
    event = threshold_event(found[0])
    assert event.data == {
        "subject": "k:1",
        "subject_kind": "api_key",
        "tier": "pro",
        "rule": "a",
        "kind": "limit",
        "limit": bucket.limits[0].text,
        "amount": 60,
        "percent": 100,
        "used": 60,
        "window_start": "2023-11-15T00:00:00Z",
        "window_end": "2023-11-15T00:01:00Z",
    }


def test_windows_are_periods_of_quotas_calendar_months_and_aligned_spans() -> None:
    quota = CompiledQuotas((Quota.parse("10/day"),), None, None, "pro").of(PeriodAnchor()).limits[0]
    day_us, hour_us = 86_400_000_000, 3_600_000_000
    assert window_of(quota, START_US + hour_us) == (START_US, START_US + day_us)
    assert window_of(Limit.parse("5/hour"), START_US + 1) == (START_US, START_US + hour_us)
    start_us, end_us = window_of(Limit.parse("5/month"), START_US)
    assert (end_us - start_us, START_US - start_us) == (30 * day_us, 14 * day_us), "November"


def test_without_thresholds_nothing_is_computed() -> None:
    counters, _, found = _counters()
    assert counters.watch is not None
    limits = _limits(Algorithm.FIXED_WINDOW, "2/minute")
    assert not counters.watch.watches(((limits, "k:1"),))
    counters.charge_all(((limits, "k:1"),), 2)
    assert found == []


@pytest.mark.parametrize("algorithm", [each for each in Algorithm if each is not Algorithm.LEAKY_BUCKET])
def test_a_settlement_reports_what_is_crossed_beyond_its_reservation(algorithm: Algorithm) -> None:
    counters, _, found = _counters(50, 80, 100)
    limits = _limits(algorithm, "10/minute")
    _, hold = counters.open_hold_now(((limits, "k:1"),), 2, 60_000_000)
    assert hold is not None
    assert _seen(found) == []
    counters.settle_hold_now(hold, 9)
    text = limits.limits[0].text
    assert _seen(found) == [(text, 50, 9), (text, 80, 9)]
    counters.settle_hold_now(hold, 9)
    counters.adjust_now(((limits, "k:1"),), 4)
    assert [each.percent for each in found] == [50, 80, 100], "settled again, nothing is charged; adjusted, 13 of 10"
    counters.adjust_now(((limits, "k:1"),), -3)
    assert len(found) == 3


def test_a_hold_that_expired_is_charged_and_reported_when_it_is_settled() -> None:
    counters, clock, found = _counters(100)
    limits = _limits(Algorithm.FIXED_WINDOW, "10/minute")
    _, hold = counters.open_hold_now(((limits, "k:1"),), 2, 1_000_000)
    assert hold is not None
    clock.now_us += 61_000_000
    assert counters.settle_hold_now(hold, 10).late
    assert _seen(found) == [("10/minute", 100, 10)]


@pytest.mark.parametrize(
    "limits",
    [
        _limits(Algorithm.SLIDING_WINDOW, "10/minute", "100/month"),
        _limits(Algorithm.TOKEN_BUCKET, "10/minute burst 20", soft=True),
        CompiledQuotas((Quota.parse("9/day"), Quota.parse("30/month")), Overage(50), None, "pro").of(
            PeriodAnchor.make("2026-01-31", "Europe/Berlin")
        ),
        CompiledQuotas((Quota.parse("9/day"),), None, "a", "pro", counter="a of pro").of(PeriodAnchor()),
    ],
    ids=["limits", "soft bucket", "quotas", "quotas of a rule"],
)
def test_the_id_of_a_hold_names_watched_limits_as_crossings_do(limits: LimitSet) -> None:
    watched = WatchedSet.of(limits)
    assert watched is not None
    rebuilt = watched.limit_set()
    assert rebuilt is not None
    events = [
        threshold_event(Crossing(each, limit, "c:1", 80, 8, START_US)) for each in (limits, rebuilt) for limit in each.limits
    ]
    half = len(events) // 2
    assert events[:half] == events[half:]


@pytest.mark.parametrize(
    "forged",
    [
        WatchedSet("pro:a", "loops", "pro", "a", ("1/minute",)),
        WatchedSet("pro:a", "fixed_window", "pro", "a", ("many",)),
        WatchedSet("pro:a", "fixed_window", "pro", "a", ()),
        WatchedSet("pro:a", "quota", "pro", None, ("9/day",), anchor=(1, 1, 0, "UTC")),
        WatchedSet("quotas/", "quota", "pro", None, ("9/day",), anchor=(13, 1, 0, "UTC")),
        WatchedSet("quotas/", "quota", "pro", None, ("9/day",), anchor=(1, 1, 0, "../etc")),
        WatchedSet("quotas/", "quota", "pro", None, (), anchor=(1, 1, 0, "UTC")),
    ],
    ids=["algorithm", "limit", "no limits", "name", "month", "zone", "no quotas"],
)
def test_what_no_instance_made_names_nothing(forged: WatchedSet) -> None:
    assert forged.limit_set() is None


def test_limits_that_no_settlement_charges_are_not_named() -> None:
    slots = LimitSet("pro:a", ConcurrencyAlgorithm.CONCURRENT, [Limit.parse("3 concurrent")], tier="pro")
    assert WatchedSet.of(slots) is None
    assert WatchedSet.of(_limits(Algorithm.FIXED_WINDOW, "1/minute", name="n" * 600)) is None
