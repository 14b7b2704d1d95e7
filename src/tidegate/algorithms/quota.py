"""Quota: a count that is reset at the start of each period, which an anchor places; units above it may pass as overage.

Guarantee: in no period is more than `most` admitted. Where the anchor moves in mid-period, all that was used in the old period
counts in the new one, if anything of it was used there.
State: `(at, used)`: the second of the last charge, µs, and units used in its period. It is kept for the longest period from then.
"""

from __future__ import annotations

from typing import Final

from tidegate.policy.periods import Period
from tidegate.policy.quotas import QuotaLimit
from tidegate.timestamps import US_PER_S

KEPT_US: Final = {
    Period.DAY: 2 * 86_400 * US_PER_S,
    Period.WEEK: 9 * 86_400 * US_PER_S,
    Period.MONTH: 33 * 86_400 * US_PER_S,
    Period.YEAR: 368 * 86_400 * US_PER_S,
}
"""How long a state is kept from its last charge: as long as a period of any anchor can be; the same is in the Lua."""

QuotaState = tuple[int, int]


def decide(limit: QuotaLimit, state: QuotaState | None, now: int, cost: int) -> tuple[QuotaState | None, int, int, int | None]:
    """Charge a cost to the period that contains `now`.

    Args:
        state: None for nothing.
        now: µs since the epoch; before the last charge it counts as the second of that.
        cost: units, 0 or more.

    Returns:
        See `tidegate.algorithms`; `remaining` is below 0 by the units above the quota.
    """
    used = 0
    if state is None:
        start, end = limit.clock.bounds(now)
    else:
        at, used = state
        now = max(now, at)
        start, end = limit.clock.bounds(now)
        if at < start:
            used = 0
    total = used + cost
    if total <= limit.most or not cost:
        return (now - now % US_PER_S, total), limit.amount - total, end - now, 0
    return None, max(limit.amount - used, 0), end - now, end - now if cost <= limit.most else None


def expires_at(limit: QuotaLimit, state: QuotaState) -> int:
    """When the state cannot count any more, whatever the anchor.

    Returns:
        µs since the epoch.
    """
    kept = KEPT_US.get(limit.clock.period)
    return limit.clock.bounds(state[0])[1] if kept is None else state[0] + kept


def merge(limit: QuotaLimit, state: QuotaState | None, other: QuotaState) -> QuotaState:
    """Merge a state of another store: counts of the same period are added, else the later one is kept.

    Args:
        other: the same, of another store; its units are below 0 for refunds.
    """
    if state is None:
        return other[0], max(other[1], 0)
    at = max(state[0], other[0])
    start = limit.clock.bounds(at)[0]
    return at, max((state[1] if state[0] >= start else 0) + (other[1] if other[0] >= start else 0), 0)
