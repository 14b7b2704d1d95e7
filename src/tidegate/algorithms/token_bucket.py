"""Token bucket: a bucket of `burst` tokens, refilled continuously with `amount` tokens per window.

Guarantee: in no span of time t is more than `burst + amount × t / window` admitted; so in a window at most
`burst + amount`.
State: `(level, scale, rate, at)`: consumed tokens, in units of 1/scale token, at time `at`; the level drains by `rate` units per
µs. With `g = gcd(amount, window)`, `scale = window / g` and `rate = amount / g`: all integers, so no fraction is ever lost. The
state contains its scale, so that consumption is kept when the limit changes (rounded up once to whole tokens, at most 2^53:
levels are exact up to there on every store). A calendar month counts as 31 days, a year as 366; the default burst is the amount.
"""

from __future__ import annotations

from math import gcd
from typing import TypeAlias

from tidegate.policy.limits import MAX_EXACT, Limit

BucketState: TypeAlias = tuple[int, int, int, int]


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
        level = _level_at(state, now, scale, rate)
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


def expires_at(_: Limit, state: BucketState) -> int:
    """When the bucket is full again, by the state's own rate.

    Returns:
        µs since the epoch.
    """
    level, _scale, rate, at = state
    return at - (-level // rate)


def merge(limit: Limit, state: BucketState | None, other: BucketState) -> BucketState:
    """Merge a state of another store, both as of the later of the two times.

    Args:
        other: the same, of another store; its level is below 0 for refunds, which do not drain.
    """
    scale, rate = scale_and_rate(limit)
    at = other[3] if state is None else max(state[3], other[3])
    level = 0 if state is None else _level_at(state, at, scale, rate)
    level += -(-other[0] // other[1]) * scale if other[0] < 0 else _level_at(other, at, scale, rate)
    return min(max(level, 0), MAX_EXACT), scale, rate, at


def scale_and_rate(limit: Limit) -> tuple[int, int]:
    """The integers that a limit is counted in.

    Returns:
        Units that make one token, and units that drain in one µs.
    """
    divisor = gcd(limit.amount, limit.window_us)
    return limit.window_us // divisor, limit.amount // divisor


def _level_at(state: BucketState, now: int, scale: int, rate: int) -> int:
    """The level of a state at a later time, in units of 1/scale token."""
    level, old_scale, old_rate, at = state
    level -= (now - at) * old_rate
    if level <= 0:
        return 0
    if old_scale != scale or old_rate != rate:
        return min(-(-level // old_scale) * scale, MAX_EXACT)
    return level
