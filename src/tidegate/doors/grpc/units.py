"""The time units of Envoy's limits."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from tidegate.policy.limits import Limit
from tidegate.timestamps import US_PER_S

UNKNOWN, SECOND, MINUTE, HOUR, DAY, MONTH, YEAR, WEEK = range(8)
UNITS_S: Final = {
    SECOND: 1,
    MINUTE: 60,
    HOUR: 3_600,
    DAY: 86_400,
    WEEK: 7 * 86_400,
    MONTH: 30 * 86_400,
    YEAR: 365 * 86_400,
}
"""Seconds of each unit, as envoyproxy/ratelimit counts them."""

_LONGEST_FIRST: Final = sorted(UNITS_S, key=UNITS_S.__getitem__, reverse=True)


@lru_cache(maxsize=1024)
def unit_of(window_us: int) -> tuple[int, int]:
    """The longest unit that divides a window (whole seconds, in µs), and the multiplier."""
    seconds = window_us // US_PER_S
    unit = next(each for each in _LONGEST_FIRST if seconds % UNITS_S[each] == 0)
    return unit, seconds // UNITS_S[unit]


def window_limit(amount: int, unit: int, multiplier: int = 1) -> Limit:
    """The limit of `amount` requests per `multiplier` units; a month has 30 days and a year 365."""
    return Limit(amount, UNITS_S[unit] * multiplier * US_PER_S)
