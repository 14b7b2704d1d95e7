"""Sliding log: stores the time and cost of every admission.

Guarantee: exact. In no window `(t − window, t]` is more than the amount admitted.
Cost: one entry per admission (16 to 48 bytes in memory), so amounts are limited to 100,000 and a charge copies the log.
State: `(used, times, costs)`, ordered by time. A calendar month counts as 31 days, a year as 366.
Denials: the retry is exact where up to `LOOK_AHEAD` entries have to expire first. Where more have to, which takes a cost of more
than `LOOK_AHEAD` units, it is the expiry of the last entry examined: the same cost cannot pass earlier.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import islice
from typing import Final, TypeAlias

from tidegate.policy.limits import Limit

LOOK_AHEAD: Final = 1000
"""Maximum number of entries that a denial examines to find its retry; the same number is in the Lua."""

LogState: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...]]


def decide(limit: Limit, state: LogState | None, now: int, cost: int) -> tuple[LogState | None, int, int, int | None]:
    """Charge a cost at `now`.

    Args:
        state: units used, times in µs, costs; None for nothing.
        now: µs since the epoch; before the last entry it counts as that entry's time.
        cost: units, 0 or more.
    """
    window = limit.window_us
    used, times, costs = state if state is not None else (0, (), ())
    expired = 0
    if times:
        now = max(now, times[-1])
        if times[0] <= now - window:
            expired = bisect_right(times, now - window)
            used -= sum(islice(costs, expired))
    free = limit.amount - used
    if cost <= free or not cost:
        if expired:
            times, costs = times[expired:], costs[expired:]
        if cost:
            if times and times[-1] == now:
                costs = (*costs[:-1], costs[-1] + cost)
            else:
                times, costs = (*times, now), (*costs, cost)
        reset = times[-1] + window - now if times else 0
        return (used + cost, times, costs), max(free - cost, 0), reset, 0
    reset = times[-1] + window - now if expired < len(times) else 0
    if cost > limit.amount:
        return None, max(free, 0), reset, None
    # A denial copies nothing: denied clients often retry immediately.
    needed, at = cost - free, expired
    for at in range(expired, min(expired + LOOK_AHEAD, len(times))):
        needed -= costs[at]
        if needed <= 0:
            break
    return None, max(free, 0), reset, times[at] + window - now


def expires_at(limit: Limit, state: LogState) -> int:
    """When the state expires: one window after its last entry.

    Returns:
        µs since the epoch.
    """
    return state[1][-1] + limit.window_us if state[1] else 0


def merge(_: Limit, state: LogState | None, other: LogState) -> LogState:
    """Merge the entries of another store.

    Args:
        other: the same, of another store; its costs are below 0 for refunds.
    """
    entries: dict[int, int] = {}
    for _used, times, costs in (other,) if state is None else (state, other):
        for time, cost in zip(times, costs, strict=True):
            entries[time] = entries.get(time, 0) + cost
    kept = sorted((time, cost) for time, cost in entries.items() if cost > 0)
    return sum(cost for _, cost in kept), tuple(time for time, _ in kept), tuple(cost for _, cost in kept)
