"""What the drills of PostgreSQL, floods and soaks compute from what they saw."""

from __future__ import annotations

import pytest
from drills.findings import Findings, none_of
from drills.key_load import CheckResult, Operator, Write
from drills.outcome import Goal
from drills.postgres_failures import p99_ms
from drills.soak import slope


def test_a_slope_is_that_of_the_line() -> None:
    assert slope([7.0] * 20) == 0.0
    assert slope([10 + 0.5 * second for second in range(40)]) == pytest.approx(30.0)
    assert slope([10 - 0.5 * look for look in range(40)], every_s=2) == pytest.approx(-15.0)


def test_a_write_counts_as_back_only_where_it_was_sent_after_the_kill() -> None:
    operator = Operator("http://127.0.0.1:1", "free")
    assert operator.away_s(0.0) is None
    # The first was under way at 10 s and may have been committed before; the second failed; the third is of the new primary.
    operator.writes += [
        Write(9.9, 10.4, 201, "a"),
        Write(10.5, 12.0, 503, ""),
        Write(14.0, 16.5, 201, "b"),
        Write(17, 17.1, 201, "c"),
    ]
    assert operator.away_s(10.0) == 6.5
    assert operator.away_s(18.0) is None
    assert operator.longest_gap_s(10.0, 18.0) == pytest.approx(6.1)
    assert operator.longest_gap_s(10.0, 30.0) == pytest.approx(12.9), "silence until the end counts"


def test_the_percentile_leaves_out_what_was_not_decided() -> None:
    results = [CheckResult(0.0, 0.001 * (number + 1), "k", 200, "") for number in range(100)] + [
        CheckResult(0.0, 9.0, "k", 503, "X")
    ]
    assert p99_ms(results) == pytest.approx(99.01)
    assert p99_ms([]) == 0.0


def test_a_missed_goal_is_reported_and_a_timed_one_only_where_time_counts() -> None:
    missed = Findings([("figure", "7")], [none_of("errors", 3)])
    assert not missed.met()
    assert "FAIL" in missed.table()
    assert "figure" in missed.table()
    timed = Findings([], [Goal("p99", "12 ms", "< 10 ms", False, timed=True), none_of("errors", 0)])
    assert not timed.met()
    assert timed.met(timed=False)
    assert "FAIL" in timed.table()
    assert "FAIL" not in timed.table(timed=False)
