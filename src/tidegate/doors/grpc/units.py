"""The units of the protocol's limits."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from tidegate.policy.limits import Limit
from tidegate.timestamps import US_PER_S

SECOND, MINUTE, HOUR, DAY, MONTH, YEAR, WEEK = 1, 2, 3, 4, 5, 6, 7
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
    """The unit of a window, and how many of them it has.

    Args:
        window_us: length of the window, whole seconds in µs.

    Returns:
        Number of the longest unit that it has a whole number of, and that number.
    """
    seconds = window_us // US_PER_S
    unit = next(each for each in _LONGEST_FIRST if seconds % UNITS_S[each] == 0)
    return unit, seconds // UNITS_S[unit]


def window_limit(amount: int, unit: int, multiplier: int = 1) -> Limit:
    """The limit of a number of requests for each unit: a window of fixed length, a month of 30 days and a year of 365.

    Args:
        amount: requests, 0 or more.
        unit: number of the unit.
        multiplier: how many units the window has.

    Returns:
        The limit.
    """
    return Limit(amount, UNITS_S[unit] * multiplier * US_PER_S)
