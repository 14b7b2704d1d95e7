"""Sliding log: every admission is remembered with its moment and cost.

Promise: exact. In no window `(t − window, t]`, wherever it lies, is more than the amount admitted.
Price: one entry per admission (16 to 48 bytes in memory), so amounts are limited to 100,000 and a charge copies the log.
State: `(used, moments, costs)`, the moments in order. A calendar month counts as 31 days, a year as 366.
Denials: the retry is exact where up to `LOOK_AHEAD` entries have to expire first. Where more have to, which takes a cost of more
than `LOOK_AHEAD` units, it is the expiry of the last entry examined: the same cost cannot pass earlier.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import islice
from typing import Final, TypeAlias

from tidegate.policy.limits import Limit

LOOK_AHEAD: Final = 1000
"""Most entries that a denial examines to find its retry; the same number is in the Lua."""

LogState: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...]]


def decide(limit: Limit, state: LogState | None, now: int, cost: int) -> tuple[LogState | None, int, int, int | None]:
    """Charge a cost at `now`.

    Args:
        state: units used, moments in µs, costs; None for nothing.
        now: µs since the epoch; before the last entry it counts as that entry's moment.
        cost: units, 0 or more.
    """
    window = limit.window_us
    used, moments, costs = state if state is not None else (0, (), ())
    gone = 0
    if moments:
        now = max(now, moments[-1])
        if moments[0] <= now - window:
            gone = bisect_right(moments, now - window)
            used -= sum(islice(costs, gone))
    free = limit.amount - used
    if cost <= free or not cost:
        if gone:
            moments, costs = moments[gone:], costs[gone:]
        if cost:
            if moments and moments[-1] == now:
                costs = (*costs[:-1], costs[-1] + cost)
            else:
                moments, costs = (*moments, now), (*costs, cost)
        reset = moments[-1] + window - now if moments else 0
        return (used + cost, moments, costs), max(free - cost, 0), reset, 0
    reset = moments[-1] + window - now if gone < len(moments) else 0
    if cost > limit.amount:
        return None, max(free, 0), reset, None
    # A denial copies nothing: denied clients often retry immediately.
    needed, at = cost - free, gone
    for at in range(gone, min(gone + LOOK_AHEAD, len(moments))):
        needed -= costs[at]
        if needed <= 0:
            break
    return None, max(free, 0), reset, moments[at] + window - now


def expires_at(limit: Limit, state: LogState) -> int:
    """When the state stops counting: one window after its last entry.

    Returns:
        µs since the epoch.
    """
    return state[1][-1] + limit.window_us if state[1] else 0


def merge(_: Limit, state: LogState | None, other: LogState) -> LogState:
    """Put entries of elsewhere in their places.

    Args:
        other: the same, of elsewhere; its costs are below 0 where they are given back.
    """
    entries: dict[int, int] = {}
    for _used, moments, costs in (other,) if state is None else (state, other):
        for moment, cost in zip(moments, costs, strict=True):
            entries[moment] = entries.get(moment, 0) + cost
    kept = sorted((moment, cost) for moment, cost in entries.items() if cost > 0)
    return sum(cost for _, cost in kept), tuple(moment for moment, _ in kept), tuple(cost for _, cost in kept)
