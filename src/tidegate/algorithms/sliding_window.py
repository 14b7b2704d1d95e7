"""Sliding window: the current window's count plus the previous one's, weighted by the part of it within the last window length.

Guarantee: `current + floor(previous × (window − elapsed) / window)` never exceeds the amount at an admission; so no window
aligned to the epoch (or calendar month or year) holds more than the amount.
Bound: the weight assumes that the previous window's requests were spread evenly; over an arbitrary window the count stays below
twice the amount, and for evenly spread requests at the amount.
State: `(start, current, previous)`; the start is below 0 while the window is reserved and has not begun (see `reservations`).
Source: the sliding window counter as Cloudflare described it in 2017, in integers.
"""

from __future__ import annotations

from tidegate.algorithms.calendar import bounds_of
from tidegate.algorithms.reserved_windows import decide_reserved
from tidegate.policy.limits import MONTH_US, Limit


def decide(
    limit: Limit, state: tuple[int, int, int] | None, now: int, cost: int
) -> tuple[tuple[int, int, int] | None, int, int, int | None]:
    """Charge a cost to the current window.

    Args:
        state: start of the current window in µs, units in it, units in the one before; None for nothing.
        now: µs since the epoch; before the state's window it counts as that window's start.
        cost: units, 0 or more.
    """
    window = limit.window_us
    # Only long windows can be calendar windows: one comparison for all others.
    if window >= MONTH_US and limit.is_calendar:
        return _decide_in_calendar(limit, state, now, cost)
    if state is None:
        start = now - now % window
        current = previous = 0
    else:
        start, current, previous = state
        elapsed = now - start
        if elapsed >= window:
            if start < 0:
                return decide_reserved(decide, limit, state, now, cost)
            previous = current if elapsed < 2 * window else 0
            current = 0
            start = now - now % window
        elif elapsed < 0:
            now = start
    left = start + window - now
    free = limit.amount - current - previous * left // window if previous else limit.amount - current
    if cost <= free or not cost:
        current += cost
        # `_reset`, written out for the usual case.
        reset = left + window + 1 + -window // current if current else _reset(0, previous, left, window, window)
        return (start, current, previous), free - cost if free > cost else 0, reset, 0
    return (
        None,
        free if free > 0 else 0,
        _reset(current, previous, left, window, window),
        _retry(limit.amount, current, previous, left, window, window, cost),
    )


def _decide_in_calendar(
    limit: Limit, state: tuple[int, int, int] | None, now: int, cost: int
) -> tuple[tuple[int, int, int] | None, int, int, int | None]:
    """`decide` for calendar months or years, whose lengths differ: each count is weighted over the window after its own."""
    if state is not None:
        if state[0] < 0:
            return decide_reserved(decide, limit, state, now, cost)
        now = max(now, state[0])
    start, end = bounds_of(limit, now)
    current = previous = 0
    if state is not None:
        if state[0] == start:
            _, current, previous = state
        elif bounds_of(limit, start - 1)[0] == state[0]:
            previous = state[1]
    window = end - start
    left = end - now
    following_start, following_end = bounds_of(limit, end)
    following = following_end - following_start
    free = limit.amount - current - previous * left // window
    if cost <= free or not cost:
        current += cost
        return (start, current, previous), max(free - cost, 0), _reset(current, previous, left, window, following), 0
    return (
        None,
        max(free, 0),
        _reset(current, previous, left, window, following),
        _retry(limit.amount, current, previous, left, window, following, cost),
    )


def _reset(current: int, previous: int, left: int, window: int, following: int) -> int:
    """µs until the weighted count is 0.

    `floor(n × r / w) = 0` from `r ≤ ceil(w / n) − 1` on, where r is what is left of the window in which n fades.
    """
    if current:
        return left + following + 1 + -following // current
    if previous:
        until = left + 1 + -window // previous
        return until if until > 0 else 0
    return 0


def _retry(amount: int, current: int, previous: int, left: int, window: int, following: int, cost: int) -> int | None:
    """µs until the cost passes without other charges.

    `floor(n × r / w) ≤ a` from `r ≤ ceil((a + 1) × w / n) − 1` on; if the current count alone leaves no room, that happens in
    the following window, where it is the one that fades.
    """
    if cost > amount:
        return None
    room = amount - current - cost
    if room >= 0:
        return left + 1 + -(room + 1) * window // previous
    return left + following + 1 + -(amount - cost + 1) * following // current


def expires_at(limit: Limit, state: tuple[int, int, int]) -> int:
    """When the state expires: when the weighted count is 0.

    Returns:
        µs since the epoch.
    """
    start, current, previous = abs(state[0]), state[1], state[2]
    if limit.is_calendar:
        end = bounds_of(limit, start)[1]
        following = bounds_of(limit, end)[1] - end
    else:
        end = start + limit.window_us
        following = limit.window_us
    return start + _reset(current, previous, end - start, end - start, following)


def merge(limit: Limit, state: tuple[int, int, int] | None, other: tuple[int, int, int]) -> tuple[int, int, int]:
    """Merge a state of another store, both as of the later of the two windows.

    Args:
        other: the same, of another store; its units are below 0 for refunds.
    """
    if state is None:
        state = (other[0], 0, 0)
    sign = -1 if state[0] < 0 and -state[0] >= other[0] else 1
    state = (abs(state[0]), state[1], state[2])
    start = max(state[0], other[0])
    current, previous = _seen_from(limit, state, start)
    more, more_before = _seen_from(limit, other, start)
    return sign * start, max(current + more, 0), max(previous + more_before, 0)


def _seen_from(limit: Limit, state: tuple[int, int, int], start: int) -> tuple[int, int]:
    """Units in the window that starts at `start`, which is not before the state's, and in the one before it."""
    if state[0] == start:
        return state[1], state[2]
    before = bounds_of(limit, start - 1)[0] if limit.is_calendar else start - limit.window_us
    return 0, state[1] if state[0] == before else 0
