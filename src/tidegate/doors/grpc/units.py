"""The units of the protocol's limits."""

from __future__ import annotations

from typing import Final

from tidegate.limits import US_PER_S, Limit

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

_UNIT_OF_US: Final = {seconds * US_PER_S: unit for unit, seconds in UNITS_S.items()}


def unit_of(limit: Limit) -> int:
    """The unit of a limit's window.

    Args:
        limit: any limit.

    Returns:
        Its number; 0 where no unit has that length.
    """
    return MONTH if limit.calendar_month else _UNIT_OF_US.get(limit.window_us, 0)


def window_limit(amount: int, unit: int) -> Limit:
    """The limit of a number of requests for each unit: a window of fixed length, a month of 30 days and a year of 365.

    Args:
        amount: requests, 0 or more.
        unit: number of the unit.

    Returns:
        The limit.
    """
    return Limit(amount, UNITS_S[unit] * US_PER_S)
