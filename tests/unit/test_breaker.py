"""The breaker: what opens it, who is the probe, what closes it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidegate.breaker import Breaker, BreakerOptions, BreakerState

OPTIONS = BreakerOptions(failures=5, window_s=10, open_s=30)


def opened(at: float = 100.0) -> Breaker:
    breaker = Breaker(OPTIONS)
    for _ in range(5):
        breaker.failed(at)
    assert breaker.state is BreakerState.OPEN
    return breaker


def test_it_opens_after_five_failures_in_ten_seconds() -> None:
    breaker = Breaker(OPTIONS)
    for at in (0, 1, 2, 3):
        breaker.failed(at)
        assert breaker.state is BreakerState.CLOSED
    breaker.failed(10.0)
    assert breaker.state is BreakerState.OPEN
    assert breaker.opened == 1


def test_failures_that_are_too_far_apart_do_not_open_it() -> None:
    breaker = Breaker(OPTIONS)
    for step in range(40):
        breaker.failed(step * 2.6)
        assert breaker.admits(step * 2.6)
    assert breaker.state is BreakerState.CLOSED


def test_what_one_event_takes_down_is_one_failure() -> None:
    breaker = Breaker(OPTIONS)
    for _ in range(1000):
        breaker.failed(1.0, event=7)
    assert breaker.state is BreakerState.CLOSED
    for event in (8, 9, 10, 11):
        breaker.failed(1.0, event)
    assert breaker.state is BreakerState.OPEN


def test_one_probe_alone_decides() -> None:
    breaker = opened(100)
    assert not breaker.admits(129.9)
    assert breaker.admits(130)
    assert not any(breaker.admits(130 + step / 10) for step in range(299))
    breaker.failed(131)
    assert breaker.state is BreakerState.OPEN
    assert not breaker.admits(160.9)
    assert breaker.admits(161)
    breaker.succeeded()
    assert breaker.state is BreakerState.CLOSED
    assert all(breaker.admits(161) for _ in range(10))
    for _ in range(4):
        breaker.failed(161)
    assert breaker.state is BreakerState.CLOSED, "failures from before it closed do not count"


def test_a_probe_without_an_outcome_does_not_keep_it_open_for_ever() -> None:
    breaker = opened(0)
    assert breaker.admits(30)
    assert not breaker.admits(59.9)
    assert breaker.admits(60)


@given(st.lists(st.tuples(st.sampled_from(["fail", "succeed", "ask"]), st.floats(0, 20)), max_size=80))
def test_it_never_admits_two_calls_within_open_s_of_opening(steps: list[tuple[str, float]]) -> None:
    breaker, now, shut_since, probes = Breaker(OPTIONS), 0.0, None, 0
    for step, advance in steps:
        now += advance
        if step == "fail":
            breaker.failed(now)
        elif step == "succeed":
            breaker.succeeded()
        elif breaker.state is not BreakerState.CLOSED and breaker.admits(now):
            assert shut_since is not None
            assert now - shut_since >= OPTIONS.open_s
            probes += 1
            shut_since = now
        if breaker.state is BreakerState.OPEN and shut_since is None:
            shut_since = now
        if breaker.state is BreakerState.CLOSED:
            shut_since = None
            assert breaker.admits(now)


def test_it_is_idle_when_it_remembers_nothing() -> None:
    breaker = Breaker(OPTIONS)
    assert breaker.is_idle(0)
    breaker.failed(0)
    assert not breaker.is_idle(10)
    assert breaker.is_idle(10.1)
    assert not opened(0).is_idle(1000)
