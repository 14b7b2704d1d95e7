"""Token bucket: a bucket of `burst` tokens, refilled continuously with `amount` tokens per window.

Promise: in no span of time t, wherever it lies, is more than `burst + amount × t / window` admitted; so in a window at most
`burst + amount`.
State: `(level, scale, rate, at)`: what was taken, in units of 1/scale token, as it stood at `at`; it drains by `rate` units a µs.
With `g = gcd(amount, window)`, `scale = window / g` and `rate = amount / g`: all integers, so no fraction is ever lost. The state
says its own scale, so that a changed limit finds what was taken (rounded up to whole tokens once).
A calendar month counts as 31 days; the default burst is the amount.
"""

from __future__ import annotations

from math import gcd
from typing import TypeAlias

from tidegate.limits import Limit

BucketState: TypeAlias = tuple[int, int, int, int]


def decide(limit: Limit, state: BucketState | None, now: int, cost: int) -> tuple[BucketState | None, int, int, int | None]:
    """Take `cost` tokens at `now`.

    Args:
        limit: what holds; its burst must be set, as in every `LimitSet`.
        state: see the module; None for a full bucket.
        now: µs since the epoch; before the state's moment it counts as that moment.
        cost: tokens, 0 or more.

    Returns:
        See `tidegate.algorithms`.
    """
    divisor = gcd(limit.amount, limit.window_us)
    scale = limit.window_us // divisor
    rate = limit.amount // divisor
    if state is None:
        level = 0
    else:
        level, old_scale, old_rate, at = state
        now = max(now, at)
        level -= (now - at) * old_rate
        if level <= 0:
            level = 0
        elif old_scale != scale or old_rate != rate:
            level = -(-level // old_scale) * scale
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

    Args:
        _: the limit; not needed, the state says it all.
        state: as `decide` gave it.

    Returns:
        µs since the epoch.
    """
    level, _scale, rate, at = state
    return at - (-level // rate)
