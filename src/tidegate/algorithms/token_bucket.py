"""Token bucket: a bucket of `burst` tokens, refilled continuously with `amount` tokens per window.

Promise: in no span of time t, wherever it lies, is more than `burst + amount × t / window` admitted; so in a window at most
`burst + amount`.
State: `(level, scale, rate, at)`: what was taken, in units of 1/scale token, as it stood at `at`; it drains by `rate` units a µs.
With `g = gcd(amount, window)`, `scale = window / g` and `rate = amount / g`: all integers, so no fraction is ever lost. The state
says its own scale, so that a changed limit finds what was taken (rounded up to whole tokens once, and 2^53 at the most: levels
are exact up to there on every store).
A calendar month counts as 31 days, a year as 366; the default burst is the amount.
"""

from __future__ import annotations

from math import gcd
from typing import TypeAlias

from tidegate.policy.limits import MAX_EXACT, Limit

BucketState: TypeAlias = tuple[int, int, int, int]


def decide(limit: Limit, state: BucketState | None, now: int, cost: int) -> tuple[BucketState | None, int, int, int | None]:
    """Take `cost` tokens at `now`.

    Args:
        limit: what holds; its burst must be set, as in every `LimitSet`.
        state: see the module; None for a full bucket.
        now: µs since the epoch; before the state's moment it counts as that moment.
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
    """Add what was taken elsewhere, both as they stand at the later of the two moments.

    Args:
        other: the same, of elsewhere; its level is below 0 where tokens are given back: those do not drain.
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
    """What is left of a state's level at a moment that is not before it, in units of 1/scale token."""
    level, old_scale, old_rate, at = state
    level -= (now - at) * old_rate
    if level <= 0:
        return 0
    if old_scale != scale or old_rate != rate:
        return min(-(-level // old_scale) * scale, MAX_EXACT)
    return level
