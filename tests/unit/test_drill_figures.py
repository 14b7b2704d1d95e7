"""The arithmetic of a drill's table."""

from __future__ import annotations

import pytest
from drills.admissions import Admission
from drills.check_load import LOOSE, TIGHT, Seen, policy_of
from drills.figures import (
    admitted_of,
    asked_of,
    between,
    bucket_percentile_ms,
    longest_gap_s,
    over_admitted,
    percentile_ms,
    recovery_s,
    uncounted,
    under_admitted,
    under_in_windows,
)
from drills.outcome import Goal, at_most

from tidegate.policy.toml_reader import parse_policy

SECOND_US = 1_000_000


def seen(at_s: float, latency_s: float = 0.001, degraded: bool = False, failure: str | None = None, ip: str = "a") -> Seen:
    return Seen(at_s, latency_s, TIGHT, ip, failure is None, degraded, failure)


def is_bad(each: Seen) -> bool:
    return each.degraded or each.failure is not None


@pytest.mark.parametrize(
    ("latencies_ms", "quantile", "expected_ms"),
    [
        ([], 0.99, 0.0),
        ([7], 0.5, 7),
        ([7], 0.99, 7),
        (range(1, 101), 0.5, 50),
        (range(1, 101), 0.99, 99),
        (range(1, 102), 0.99, 100),
        (range(1, 1001), 0.999, 999),
        ([5, 1, 3], 0.5, 3),
    ],
)
def test_percentile(latencies_ms: list[int], quantile: float, expected_ms: float) -> None:
    checks = [seen(number, latency / 1000) for number, latency in enumerate(latencies_ms)]
    assert percentile_ms(checks, quantile) == pytest.approx(expected_ms)


def test_what_failed_has_no_latency() -> None:
    assert percentile_ms([seen(0, 0.002), seen(1, 10, failure="no answer in time")], 0.99) == pytest.approx(2)


def test_a_span_has_its_first_time_and_not_its_end() -> None:
    assert [each.at_s for each in between([seen(0), seen(1), seen(2)], 1, 2)] == [1]


@pytest.mark.parametrize(
    ("checks", "ended_s", "expected_s"),
    [
        ([], None, 0.0),
        ([seen(1, 0), seen(2, 0), seen(5, 0)], None, 3.0),
        # Answers count, not questions: this one was asked early and answered late.
        ([seen(1, 0), seen(1.5, 2.5), seen(2, 0)], None, 2.0),
        # Silence at the beginning and at the end is silence too.
        ([seen(4, 0), seen(5, 0)], None, 4.0),
        ([seen(1, 0), seen(2, 0)], 9, 7.0),
        ([seen(1, 0), seen(2, 0, failure="status 503"), seen(3, 0)], None, 2.0),
        ([seen(1, 0), seen(2, 0)], 1.5, 1.0),
    ],
)
def test_longest_gap(checks: list[Seen], ended_s: float | None, expected_s: float) -> None:
    assert longest_gap_s(checks, 0, ended_s) == pytest.approx(expected_s)


def test_recovery_is_until_the_last_bad_answer_came() -> None:
    checks = [seen(number / 10, 0.05, degraded=20 <= number < 30) for number in range(100)]
    assert recovery_s(checks, 1.5, is_bad) == pytest.approx(2.9 + 0.05 - 1.5)


def test_recovery_of_what_was_never_bad_is_at_once() -> None:
    # Bad before the event, and answered before it, is not of the event.
    checks = [seen(number / 10, degraded=number == 3) for number in range(100)]
    assert recovery_s(checks, 1.5, is_bad) == 0.0


def test_what_is_bad_to_the_end_has_not_recovered() -> None:
    checks = [seen(number / 10, failure="status 503" if number >= 20 and number % 15 == 0 else None) for number in range(100)]
    assert recovery_s(checks, 1.5, is_bad) is None


def test_a_stray_long_after_is_not_of_the_event() -> None:
    checks = [seen(number / 10, 0, degraded=20 <= number < 30 or number == 70) for number in range(100)]
    assert recovery_s(checks, 1.5, is_bad) == pytest.approx(1.4)
    assert recovery_s(checks, 6.5, is_bad) == pytest.approx(0.5)


def test_units_above_and_below_the_limits() -> None:
    asked = {"a": 50, "b": 30, "c": 50, "d": 50}
    admitted = {"a": 43, "b": 28, "c": 40}
    assert over_admitted(admitted, 40) == 3
    # Of b two of what it asked for; of d all that the limit had room for.
    assert under_admitted(asked, admitted, 40) == 2 + 40


def test_units_by_subject_and_rule() -> None:
    checks = [seen(0), seen(1, failure="status 503"), seen(2)._replace(allowed=False), seen(3)._replace(rule=LOOSE)]
    assert asked_of(checks, TIGHT) == {"a": 3}
    assert admitted_of(checks, TIGHT) == {"a": 1}


def test_what_redis_does_not_know() -> None:
    assert uncounted({"a": 5, "b": 5, "c": 5}, {"a": 4, "b": 7}) == 1 + 5


def answer(at_s: float, allowed: bool, subject: str = "i:a") -> Admission:
    return Admission("public:tight", subject, 1, allowed, False, round((at_s - 0.01) * SECOND_US), round(at_s * SECOND_US))


def test_whole_windows_alone_are_held_against_the_limit() -> None:
    # The first and the last window are not whole: what is missing there is not looked at.
    first = [answer(9, False)]
    well = [answer(10 + number, number < 3) for number in range(10)]
    short = [answer(20 + number, number < 2) for number in range(10)]
    last = [answer(30, False)]
    assert under_in_windows([*first, *well, *short, *last], 3, 10 * SECOND_US) == (1, 2)


def test_a_window_in_which_less_was_asked_is_not_short() -> None:
    answers = [answer(5, True), answer(12, True), answer(25, True)]
    assert under_in_windows(answers, 3, 10 * SECOND_US) == (0, 1)


def test_no_answers_have_no_windows() -> None:
    assert under_in_windows([], 3, 10 * SECOND_US) == (0, 0)


def test_goals_of_time() -> None:
    assert at_most("back", 4.94, 5, "s") == Goal("back", "4.9 s", "< 5 s", True, timed=True)
    assert not at_most("back", 5, 5, "s").met
    assert not at_most("back", None, 5, "s").met


def test_the_policy_of_a_drill_is_one() -> None:
    (tier,) = parse_policy(policy_of("40/366d")).tiers
    assert [rule.name for rule in tier.rules] == [TIGHT, LOOSE]


@pytest.mark.parametrize(
    ("counts", "quantile", "ms"),
    [
        ({}, 0.99, 0.0),
        ({0.001: 0, float("inf"): 0}, 0.99, 0.0),
        ({0.001: 0, 0.002: 100, float("inf"): 100}, 0.5, 1.5),
        ({0.001: 99, 0.002: 99, 0.005: 100, float("inf"): 100}, 0.99, 1.0),
        ({0.001: 98, 0.002: 98, 0.005: 100, float("inf"): 100}, 0.99, 3.5),
        ({0.001: 50, float("inf"): 100}, 0.99, 1.0),
    ],
)
def test_a_quantile_of_buckets(counts: dict[float, int], quantile: float, ms: float) -> None:
    assert bucket_percentile_ms(counts, quantile) == pytest.approx(ms)
