"""The arithmetic of availability: held against figures worked out by hand, and against counting every combination."""

from __future__ import annotations

import itertools

import pytest
from drills.availability import (
    BUDGET_MIN,
    CHECKS,
    EXACT,
    MINUTES_A_YEAR,
    SERVICES,
    TOPOLOGIES,
    Component,
    Measured,
    Rate,
    Topology,
    holds_until,
    main,
    table,
)

HALF_A_DAY = Rate(1, 720, "for a test")


def component(machines: int, needed: int, rate: Rate = HALF_A_DAY, seconds: float = 0.0) -> Component:
    return Component("some", machines, needed, rate, {CHECKS: Measured(seconds, "for a test")}, [CHECKS])


def test_the_budget_is_that_of_four_nines() -> None:
    assert pytest.approx(52.56) == BUDGET_MIN
    assert pytest.approx(0.9999) == 1 - BUDGET_MIN / MINUTES_A_YEAR


@pytest.mark.parametrize(("machines", "needed"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (5, 3), (3, 0)])
def test_too_few_are_up_as_often_as_all_combinations_say(machines: int, needed: int) -> None:
    down = 720 / MINUTES_A_YEAR
    expected = 0.0
    for up in itertools.product([True, False], repeat=machines):
        if sum(up) < needed:
            share = 1.0
            for each in up:
                share *= 1 - down if each else down
            expected += share
    assert component(machines, needed).short() == pytest.approx(expected, rel=1e-9)


def test_minutes_by_hand() -> None:
    # One machine, one failure of half a day.
    assert component(1, 1).minutes(CHECKS) == pytest.approx(720)
    # Two, of which one is enough: 720 x 720 / 525,600; and twice a year 30 s of switching.
    assert component(2, 1, seconds=30).minutes(CHECKS) == pytest.approx(720 * 720 / MINUTES_A_YEAR + 1.0)
    # What a service does not depend on costs it nothing.
    assert component(2, 1, seconds=30).minutes(EXACT) == 0.0
    assert Topology("two", [component(1, 1), component(1, 1)]).minutes(CHECKS) == pytest.approx(1440)


def test_more_failures_and_longer_repairs_cost_more() -> None:
    for topology in TOPOLOGIES:
        for service in SERVICES:
            assert topology.scaled(failures=2).minutes(service) > topology.minutes(service)
            assert topology.scaled(repair=2).minutes(service) > topology.minutes(service)
            assert topology.scaled().minutes(service) == topology.minutes(service)


def test_the_bound_of_a_factor_is_found() -> None:
    assert holds_until(lambda factor: factor <= 7.25) == pytest.approx(7.25)
    assert holds_until(lambda _: True, 1000) == 1000
    last = TOPOLOGIES[-1]
    factor = holds_until(lambda tried: last.scaled(repair=tried).minutes(CHECKS) <= BUDGET_MIN, 1000)
    assert last.scaled(repair=factor).minutes(CHECKS) == pytest.approx(BUDGET_MIN, rel=1e-6)


def test_every_input_names_its_source_and_every_table_its_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    for topology in TOPOLOGIES:
        assert ("DOES NOT" in table(topology)) == any(topology.minutes(service) > BUDGET_MIN for service in SERVICES)
        for each in topology.components:
            assert each.rate.source.startswith("assumed: ")
            assert all("python -m " in measured.source for measured in each.switching.values())
    main()
    told = capsys.readouterr().out
    assert all(topology.name in told for topology in TOPOLOGIES)
