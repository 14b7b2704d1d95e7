"""Fixed window: a count that is reset at the start of each window.

Guarantee: in no window aligned to the epoch (for months and years, to the UTC calendar) is more than the amount admitted.
Bound: across a window's border up to twice the amount may pass within one window's length.
State: `(start, used)`; the start is below 0 while the window is reserved and has not begun (see `reservations`).
"""

from __future__ import annotations

from tidegate.algorithms.calendar import bounds_of
from tidegate.algorithms.reserved_windows import decide_reserved
from tidegate.policy.limits import MONTH_US, Limit


def decide(
    limit: Limit, state: tuple[int, int] | None, now: int, cost: int
) -> tuple[tuple[int, int] | None, int, int, int | None]:
    """Charge a cost to the window that contains `now`.

    Args:
        state: start of the window, µs, and units used in it; None for nothing.
        now: µs since the epoch; before the state's window it counts as that window's start.
        cost: units, 0 or more.
    """
    window = limit.window_us
    # Only long windows can be calendar windows: one comparison for all others.
    calendar = window >= MONTH_US and limit.is_calendar
    if calendar:
        start, end = bounds_of(limit, now)
    else:
        start = now - now % window
        end = start + window
    used = 0
    if state is not None and state[0] >= start:
        if state[0] > start:
            now = start = state[0]
            end = bounds_of(limit, start)[1] if calendar else start + window
        used = state[1]
    elif state is not None and state[0] < 0:
        return decide_reserved(decide, limit, state, now, cost)
    free = limit.amount - used
    if cost <= free or not cost:
        return (start, used + cost), max(free - cost, 0), end - now, 0
    return None, max(free, 0), end - now, end - now if cost <= limit.amount else None


def expires_at(limit: Limit, state: tuple[int, int]) -> int:
    """When the state expires: the end of its window.

    Returns:
        µs since the epoch.
    """
    start = abs(state[0])
    return bounds_of(limit, start)[1] if limit.is_calendar else start + limit.window_us


def merge(_: Limit, state: tuple[int, int] | None, other: tuple[int, int]) -> tuple[int, int]:
    """Merge a state of another store: of different windows the later one is kept, counts of the same window are added.

    Args:
        other: the same, of another store; its units are below 0 for refunds.
    """
    if state is None or other[0] > abs(state[0]):
        return other[0], max(other[1], 0)
    if other[0] < abs(state[0]):
        return state
    return state[0], max(state[1] + other[1], 0)
