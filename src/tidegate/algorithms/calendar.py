"""UTC calendar months and years in integer µs since the epoch."""

from __future__ import annotations

import datetime
from functools import lru_cache
from typing import Final

from tidegate.policy.limits import Limit

_DAY_US: Final = 86_400_000_000
_EPOCH_ORDINAL: Final = datetime.date(1970, 1, 1).toordinal()


def month_bounds(now_us: int) -> tuple[int, int]:
    """The calendar month that contains a time.

    Args:
        now_us: µs since the epoch, years 1970 to 9998.

    Returns:
        Start (inside) and end (outside) of the month, µs since the epoch.
    """
    return _bounds_of_day(now_us // _DAY_US)


def year_bounds(now_us: int) -> tuple[int, int]:
    """The calendar year that contains a time.

    Args:
        now_us: µs since the epoch, years 1970 to 9998.

    Returns:
        Start (inside) and end (outside) of the year, µs since the epoch.
    """
    return _year_of_day(now_us // _DAY_US)


def bounds_of(limit: Limit, now_us: int) -> tuple[int, int]:
    """The window that contains a time, of a limit per calendar month or year.

    Args:
        limit: one whose `is_calendar` is true.
        now_us: µs since the epoch, years 1970 to 9998.

    Returns:
        Start (inside) and end (outside) of the window, µs since the epoch.
    """
    return month_bounds(now_us) if limit.calendar_month else year_bounds(now_us)


@lru_cache(maxsize=256)
def _year_of_day(day: int) -> tuple[int, int]:
    year = datetime.date.fromordinal(_EPOCH_ORDINAL + day).year
    first, following = datetime.date(year, 1, 1), datetime.date(year + 1, 1, 1)
    return (first.toordinal() - _EPOCH_ORDINAL) * _DAY_US, (following.toordinal() - _EPOCH_ORDINAL) * _DAY_US


@lru_cache(maxsize=256)
def _bounds_of_day(day: int) -> tuple[int, int]:
    date = datetime.date.fromordinal(_EPOCH_ORDINAL + day)
    first = date.replace(day=1)
    following = (first + datetime.timedelta(days=32)).replace(day=1)
    return (first.toordinal() - _EPOCH_ORDINAL) * _DAY_US, (following.toordinal() - _EPOCH_ORDINAL) * _DAY_US
