"""What each algorithm promises, held against whole histories: one matrix over all five."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests import oracles
from tests.conftest import MOMENT_US
from tidegate.algorithms import DECIDE, EXPIRES_AT, sliding_log
from tidegate.policy.limits import Algorithm, Limit, fit_limits

ALL = list(Algorithm)
START = 1_700_000_000_000_000
UNITS_US = {
    "10s": 10_000_000,
    "minute": 60_000_000,
    "7m": 420_000_000,
    "day": 86_400_000_000,
    "month": 31 * 86_400_000_000,
    "year": 366 * 86_400_000_000,
}


@st.composite
def limits(draw: st.DrawFn, algorithm: Algorithm, amounts: st.SearchStrategy[int] | None = None) -> Limit:
    amount = draw(st.integers(1, 12) if amounts is None else amounts)
    window = draw(st.sampled_from(list(UNITS_US)))
    burst = f" burst {draw(st.integers(1, 15))}" if algorithm.is_bucket and draw(st.booleans()) else ""
    return fit_limits(algorithm, [Limit.parse(f"{amount}/{window}{burst}")])[0]


@st.composite
def asks(draw: st.DrawFn, limit: Limit) -> list[tuple[int, int]]:
    """Moments and costs, with steps from nothing to a few windows."""
    steps = st.one_of(
        st.just(0),
        st.integers(1, 5),
        st.integers(0, limit.window_us // max(limit.amount, 1) * 2),
        st.integers(0, limit.window_us * 3),
        st.just(limit.window_us),
    )
    costs = st.one_of(st.just(1), st.integers(0, limit.capacity + 2))
    now = START + draw(st.integers(0, 2 * limit.window_us))
    found = []
    for step, cost in draw(st.lists(st.tuples(steps, costs), min_size=1, max_size=25)):
        now += step
        found.append((now, cost))
    return found


def replay(algorithm: Algorithm, limit: Limit, sequence: list[tuple[int, int]]) -> tuple[Any, oracles.History]:
    """The state after a sequence, and what was admitted."""
    state, history = None, []
    for now, cost in sequence:
        new, *_ = DECIDE[algorithm](limit, state, now, cost)
        if new is not None and cost:
            state = new
            history.append((now, cost))
    return state, history


@pytest.mark.parametrize("algorithm", ALL)
@given(draw=st.data())
def test_every_outcome_is_what_the_history_says(algorithm: Algorithm, draw: st.DataObject) -> None:
    limit = draw.draw(limits(algorithm))
    state: Any = None
    history: oracles.History = []
    for now, cost in draw.draw(asks(limit)):
        new, remaining, reset, retry = DECIDE[algorithm](limit, state, now, cost)
        assert (new is not None) == oracles.allowed(algorithm, limit, history, now, cost)
        if new is not None and cost:
            state = new
            history.append((now, cost))
        assert remaining == max(limit.capacity - oracles.used(algorithm, limit, history, now), 0)
        assert reset >= 0
        assert (retry is None) == (new is None and cost > limit.capacity)


@pytest.mark.parametrize("algorithm", ALL)
@given(draw=st.data())
def test_never_more_than_promised(algorithm: Algorithm, draw: st.DataObject) -> None:
    limit = draw.draw(limits(algorithm))
    _, history = replay(algorithm, limit, draw.draw(asks(limit)))
    admitted = oracles.most_in_any_window(limit, history)
    match algorithm:
        case Algorithm.SLIDING_LOG:
            assert admitted <= limit.amount
        case Algorithm.TOKEN_BUCKET | Algorithm.LEAKY_BUCKET:
            for place, (first, _) in enumerate(history):
                total = 0
                for at, cost in history[place:]:
                    total += cost
                    # In whole numbers: total ≤ burst + amount × t / window
                    assert (total - limit.capacity) * limit.window_us <= limit.amount * (at - first)
        case _:
            for moment, _ in history:
                start, end = oracles.window_of(limit, moment)
                assert sum(cost for at, cost in history if start <= at < end) <= limit.amount
            if not limit.is_calendar:
                assert admitted <= 2 * limit.amount


@pytest.mark.parametrize("algorithm", ALL)
@given(draw=st.data())
def test_monotone_in_time(algorithm: Algorithm, draw: st.DataObject) -> None:
    """What passes now passes later if nobody asks in between, and no less is left."""
    limit = draw.draw(limits(algorithm))
    sequence = draw.draw(asks(limit))
    state, _ = replay(algorithm, limit, sequence)
    now = sequence[-1][0]
    cost = draw.draw(st.integers(1, limit.capacity))
    earlier = now + draw.draw(st.integers(0, 3 * limit.window_us))
    later = earlier + draw.draw(st.integers(0, 3 * limit.window_us))
    first = DECIDE[algorithm](limit, state, earlier, cost)
    second = DECIDE[algorithm](limit, state, later, cost)
    if first[0] is not None:
        assert second[0] is not None
    left = [DECIDE[algorithm](limit, state, moment, 0)[1] for moment in (earlier, later)]
    assert left[0] <= left[1]


@pytest.mark.parametrize("algorithm", ALL)
@given(draw=st.data())
def test_costs_add_up(algorithm: Algorithm, draw: st.DataObject) -> None:
    """Two charges at one instant are one charge of their sum, in outcome and in state."""
    limit = draw.draw(limits(algorithm))
    sequence = draw.draw(asks(limit))
    state, _ = replay(algorithm, limit, sequence)
    now = sequence[-1][0] + draw.draw(st.integers(0, limit.window_us))
    one, two = draw.draw(st.integers(1, 8)), draw.draw(st.integers(1, 8))
    together = DECIDE[algorithm](limit, state, now, one + two)
    first = DECIDE[algorithm](limit, state, now, one)
    if first[0] is None:
        assert together[0] is None
        return
    second = DECIDE[algorithm](limit, first[0], now, two)
    assert (second[0] is None) == (together[0] is None)
    if second[0] is not None:
        assert second == together


@pytest.mark.parametrize("algorithm", ALL)
@given(draw=st.data())
def test_retry_after_is_exact(algorithm: Algorithm, draw: st.DataObject) -> None:
    limit = draw.draw(limits(algorithm))
    sequence = draw.draw(asks(limit))
    state, _ = replay(algorithm, limit, sequence)
    now = sequence[-1][0] + draw.draw(st.integers(0, limit.window_us))
    cost = draw.draw(st.integers(1, limit.capacity + 2))
    new, _, _, retry = DECIDE[algorithm](limit, state, now, cost)
    if new is not None:
        assert retry == 0
    elif retry is None:
        assert cost > limit.capacity
    else:
        assert retry > 0
        assert DECIDE[algorithm](limit, state, now + retry - 1, cost)[0] is None
        assert DECIDE[algorithm](limit, state, now + retry, cost)[0] is not None


@pytest.mark.parametrize("algorithm", ALL)
@given(draw=st.data())
def test_reset_after_is_exact_and_the_expiry(algorithm: Algorithm, draw: st.DataObject) -> None:
    """From `reset_after` on nothing counts any more: the state may be forgotten, and not before."""
    limit = draw.draw(limits(algorithm))
    sequence = draw.draw(asks(limit))
    state, history = replay(algorithm, limit, sequence)
    assume(state is not None)
    now = history[-1][0] + draw.draw(st.integers(0, limit.window_us // 2))
    reset = DECIDE[algorithm](limit, state, now, 0)[2]
    # A fixed window resets at its end even if nothing was consumed in it.
    assume(algorithm is not Algorithm.FIXED_WINDOW or now < EXPIRES_AT[algorithm](limit, state))
    assert max(EXPIRES_AT[algorithm](limit, state) - now, 0) == reset
    for later in (0, draw.draw(st.integers(0, 3 * limit.window_us))):
        moment = now + reset + later
        assert DECIDE[algorithm](limit, state, moment, 0)[1] == limit.capacity
        after = DECIDE[algorithm](limit, state, moment, limit.capacity)
        fresh = DECIDE[algorithm](limit, None, moment, limit.capacity)
        assert after[0] is not None
        assert after[1:] == fresh[1:]
    if reset and algorithm is not Algorithm.FIXED_WINDOW:
        assert DECIDE[algorithm](limit, state, now + reset - 1, 0)[1] < limit.capacity


@pytest.mark.parametrize("algorithm", ALL)
@given(draw=st.data())
def test_changing_a_limit_keeps_what_was_consumed(algorithm: Algorithm, draw: st.DataObject) -> None:
    window = draw.draw(st.sampled_from(list(UNITS_US)))
    before, after = draw.draw(st.integers(1, 200)), draw.draw(st.integers(1, 200))
    consumed = draw.draw(st.integers(1, before))

    def limit_of(amount: int) -> Limit:
        return fit_limits(algorithm, [Limit.parse(f"{amount}/{window}" + (f" burst {amount}" if algorithm.is_bucket else ""))])[0]

    state = DECIDE[algorithm](limit_of(before), None, START, consumed)[0]
    assert DECIDE[algorithm](limit_of(after), state, START, 0)[1] == max(after - consumed, 0)
    denied = DECIDE[algorithm](limit_of(after), state, START, max(after - consumed, 0) + 1)
    assert denied[0] is None


@pytest.mark.parametrize("algorithm", ALL)
def test_three_of_a_hundred_then_a_limit_of_ten(algorithm: Algorithm) -> None:
    burst = "100/minute burst 100" if algorithm.is_bucket else "100/minute"
    wide, narrow = (fit_limits(algorithm, [Limit.parse(burst.replace("100", amount))])[0] for amount in ("100", "10"))
    state = DECIDE[algorithm](wide, None, START, 3)[0]
    assert DECIDE[algorithm](narrow, state, START, 0)[1] == 7


@pytest.mark.parametrize("algorithm", ALL)
@given(draw=st.data())
def test_a_clock_that_steps_back_forgets_nothing(algorithm: Algorithm, draw: st.DataObject) -> None:
    limit = draw.draw(limits(algorithm))
    now = START + draw.draw(st.integers(0, limit.window_us))
    state = DECIDE[algorithm](limit, None, now, limit.capacity)[0]
    earlier = now - draw.draw(st.integers(0, 3 * limit.window_us))
    assert DECIDE[algorithm](limit, state, earlier, 1)[0] is None


@pytest.mark.parametrize("algorithm", [Algorithm.FIXED_WINDOW, Algorithm.SLIDING_WINDOW, Algorithm.TOKEN_BUCKET])
@given(draw=st.data())
def test_huge_numbers_stay_exact(algorithm: Algorithm, draw: st.DataObject) -> None:
    limit = draw.draw(limits(algorithm, st.sampled_from([10**9, 864_000_000, 500_000_000])))
    state: Any = None
    history: oracles.History = []
    now = START
    for _ in range(6):
        now += draw.draw(st.integers(0, limit.window_us))
        cost = draw.draw(st.integers(0, limit.capacity))
        new, remaining, _, _ = DECIDE[algorithm](limit, state, now, cost)
        assert (new is not None) == oracles.allowed(algorithm, limit, history, now, cost)
        if new is not None and cost:
            state = new
            history.append((now, cost))
        assert remaining == limit.capacity - oracles.used(algorithm, limit, history, now)


def test_fixed_month_follows_the_calendar() -> None:
    limit = Limit.parse("1/month")
    decide = DECIDE[Algorithm.FIXED_WINDOW]
    for year, month, days in ((2024, 2, 29), (2023, 2, 28), (2023, 12, 31), (2100, 2, 28), (2000, 2, 29)):
        start, end = oracles.window_of(limit, oracles._us(oracles.EPOCH.replace(year=year, month=month, day=10)))
        assert end - start == days * 86_400_000_000
        state = decide(limit, None, start, 1)[0]
        assert decide(limit, state, end - 1, 1)[3] == 1
        assert decide(limit, state, end, 1)[0] is not None


@pytest.mark.parametrize("algorithm", [Algorithm.FIXED_WINDOW, Algorithm.SLIDING_WINDOW])
def test_a_year_follows_the_calendar(algorithm: Algorithm) -> None:
    limit = Limit.parse("4/year")
    decide = DECIDE[algorithm]
    for year, days in ((2024, 366), (2023, 365), (2100, 365), (2000, 366)):
        start, end = oracles.window_of(limit, oracles._us(oracles.EPOCH.replace(year=year, month=7, day=10)))
        assert end - start == days * 86_400_000_000
        state = decide(limit, None, start, 4)[0]
        assert decide(limit, state, end - 1, 1)[0] is None
        at_new_year = decide(limit, state, end, 1)
        # A fixed window starts anew; in a sliding one the old year fades over the new one.
        assert (at_new_year[0] is not None) == (algorithm is Algorithm.FIXED_WINDOW)
        assert decide(limit, state, oracles.window_of(limit, end)[1], 4)[0] is not None


def test_leaky_bucket_spaces_requests() -> None:
    limit = fit_limits(Algorithm.LEAKY_BUCKET, [Limit.parse("3/s")])[0]
    sequence = [(START + step * 10_000, 1) for step in range(400)]
    _, history = replay(Algorithm.LEAKY_BUCKET, limit, sequence)
    gaps = {after - before for (before, _), (after, _) in itertools.pairwise(history)}
    # A third of a second is 333,333.3 µs; asked every 10 ms, the next multiple is 340 ms.
    assert gaps == {340_000}


class _Counted(tuple[int, ...]):
    """Counts the entries that are read one by one, and the copies."""

    reads = 0

    def __getitem__(self, place: object) -> object:  # type: ignore[override]
        type(self).reads += len(range(*place.indices(len(self)))) if isinstance(place, slice) else 1
        return super().__getitem__(place)  # type: ignore[index]


def test_a_denial_of_a_long_log_is_bounded_and_its_retry_never_late() -> None:
    limit = Limit.parse("100000/day")
    moments = _Counted(range(MOMENT_US, MOMENT_US + 100_000))
    costs = _Counted([1] * 100_000)
    for now in (MOMENT_US + 200_000, MOMENT_US + limit.window_us + 4_000):
        for cost in (10, 1_000, 50_000, 100_000):
            _Counted.reads = 0
            state, _, _, retry = sliding_log.decide(limit, (100_000, moments, costs), now, cost)
            gone = max(now - limit.window_us - MOMENT_US + 1, 0)
            if cost <= gone:
                continue
            assert state is None
            exact = MOMENT_US + cost - 1 + limit.window_us - now
            assert retry == exact if cost - gone <= sliding_log.LOOK_AHEAD else retry is not None and 0 < retry < exact
            assert _Counted.reads <= sliding_log.LOOK_AHEAD + 50
