"""Token bucket: a bucket of `burst` tokens, refilled continuously with `amount` tokens per window.

Guarantee: in no span of time t is more than `burst + amount × t / window` admitted; so in a window at most
`burst + amount`.
State: `(level, scale, rate, at)`: consumed tokens, in units of 1/scale token, at time `at`; the level drains by `rate` units per
µs. With `g = gcd(amount, window)`, `scale = window / g` and `rate = amount / g`: all integers, so no fraction is ever lost. The
state contains its scale, so that consumption is kept when the limit changes (rounded up once to whole tokens, at most 2^53:
levels are exact up to there on every store). A calendar month counts as 31 days, a year as 366; the default burst is the amount.

While units are leased (see `leases`) the state has four more numbers, `(end, units, later end, later units)`: until `end` the
level does not drain below the sum of both units, until `later end` not below the later ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import TypeAlias

from tidegate.policy.limits import MAX_EXACT, Limit

BucketState: TypeAlias = tuple[int, ...]


def decide(limit: Limit, state: BucketState | None, now: int, cost: int) -> tuple[BucketState | None, int, int, int | None]:
    """Consume `cost` tokens at `now`.

    Args:
        limit: its burst must be set, as in every `LimitSet`.
        state: see the module; None for a full bucket.
        now: µs since the epoch; before the state's time it counts as that time.
        cost: tokens, 0 or more.
    """
    scale, rate = scale_and_rate(limit)
    level = 0
    if state is not None:
        now = max(now, state[3])
        level = level_at(state, now, scale, rate)
        if len(state) > 4 and (leases := live_leases(state, now)):
            return _decide_leased(limit, level, leases, now, cost)
    burst = limit.capacity
    charged = level + cost * scale
    if charged <= burst * scale or not cost:
        return (charged, scale, rate, now), max((burst * scale - charged) // scale, 0), -(-charged // rate), 0
    excess = charged - burst * scale
    return (
        None,
        max((burst * scale - level) // scale, 0),
        -(-level // rate),
        -(-excess // rate) if cost <= burst else None,
    )


def _decide_leased(
    limit: Limit, level: int, leases: tuple[int, ...], now: int, cost: int
) -> tuple[BucketState | None, int, int, int | None]:
    """`decide` while units are leased: the level stays above them, so it takes longer to drain."""
    scale, rate = scale_and_rate(limit)
    burst = limit.capacity
    charged = level + cost * scale
    if charged <= burst * scale or not cost:
        state = (charged, scale, rate, now, *leases)
        return state, max((burst * scale - charged) // scale, 0), time_until(state, 0), 0
    state = (level, scale, rate, now, *leases)
    return (
        None,
        max((burst * scale - level) // scale, 0),
        time_until(state, 0),
        time_until(state, (burst - cost) * scale) if cost <= burst else None,
    )


def expires_at(_: Limit, state: BucketState) -> int:
    """When the bucket is full again, by the state's own rate.

    Returns:
        µs since the epoch.
    """
    return state[3] + time_until(state, 0)


def time_until(state: BucketState, target: int) -> int:
    """µs from the state's time until its level is at most `target`, in the state's own units."""
    level, scale, rate, at = state[:4]
    now = at
    for end, units in _floors(state):
        if end <= now:
            continue
        floor = units * scale
        needed = -(-(level - target) // rate) if level > target else 0
        if needed == 0 or (target >= floor and now + needed <= end):
            return now - at + needed
        level = max(level - rate * (end - now), min(level, floor))
        now = end
    return now - at + (-(-(level - target) // rate) if level > target else 0)


def live_leases(state: BucketState, now: int) -> tuple[int, ...]:
    """The leases of a state that have not ended at `now`, the earlier ones first; empty where none is left."""
    if len(state) == 4:
        return ()
    end, units, later_end, later_units = state[4:]
    if end <= now or not units:
        end, units, later_end, later_units = later_end, later_units, 0, 0
    if end <= now or not units:
        return ()
    return end, units, later_end, later_units


def _floors(state: BucketState) -> Iterator[tuple[int, int]]:
    """Until when the level does not drain below how many units."""
    if len(state) > 4:
        end, units, later_end, later_units = state[4:]
        yield end, units + later_units
        yield later_end, later_units


def merge(limit: Limit, state: BucketState | None, other: BucketState) -> BucketState:
    """Merge a state of another store, both as of the later of the two times.

    Args:
        other: the same, of another store; its level is below 0 for refunds, which do not drain.
    """
    scale, rate = scale_and_rate(limit)
    at = other[3] if state is None else max(state[3], other[3])
    level = 0 if state is None else level_at(state, at, scale, rate)
    level += -(-other[0] // other[1]) * scale if other[0] < 0 else level_at(other, at, scale, rate)
    leases = () if state is None else live_leases(state, at)
    return min(max(level, 0), MAX_EXACT), scale, rate, at, *leases


def scale_and_rate(limit: Limit) -> tuple[int, int]:
    """The integers that a limit is counted in.

    Returns:
        Units that make one token, and units that drain in one µs.
    """
    divisor = gcd(limit.amount, limit.window_us)
    return limit.window_us // divisor, limit.amount // divisor


def level_at(state: BucketState, now: int, scale: int, rate: int) -> int:
    """The level of a state at a later time, in units of 1/scale token."""
    level, old_scale, old_rate, at = state if len(state) == 4 else state[:4]
    if len(state) > 4:
        for end, units in _floors(state):
            if end > at:
                until = min(end, now)
                level = max(level - (until - at) * old_rate, min(level, units * old_scale))
                at = until
    level -= (now - at) * old_rate
    if level <= 0:
        return 0
    if old_scale != scale or old_rate != rate:
        return min(-(-level // old_scale) * scale, MAX_EXACT)
    return level
