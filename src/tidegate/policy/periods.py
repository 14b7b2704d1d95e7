"""Periods of quotas: seconds to years, which begin on a day of a caller's own, at midnight in its time zone.

Days, weeks, months and years begin at 00:00 of the anchor's time zone, so a day has 23 to 25 hours where clocks change; where
midnight does not exist, the period begins with the first moment of the day. Seconds, minutes and hours have a fixed length and
are aligned to the epoch. All functions are pure; the counter store's clock decides which period a moment is in.
"""

from __future__ import annotations

import datetime
import enum
import zoneinfo
from calendar import monthrange
from functools import lru_cache
from typing import Final

import msgspec

from tidegate.errors import PolicyError
from tidegate.timestamps import US_PER_S

_DAY: Final = datetime.timedelta(days=1)
_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND: Final = datetime.timedelta(microseconds=1)
_MAX_TIMEZONE: Final = 64
BOUNDARIES: Final = 4
"""Boundaries of the period before a moment, the one that it is in, and the next one."""


class Period(enum.StrEnum):
    """The length of a quota's periods."""

    SECOND = "second"
    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    YEAR = "year"

    @property
    def longest_us(self) -> int:
        """The longest that such a period usually is, µs: 31 days for a month, 366 for a year."""
        return _LONGEST_US[self]

    @property
    def fixed_us(self) -> int | None:
        """The length of all such periods, µs; None where an anchor says when they begin."""
        return _LONGEST_US[self] if self in _FIXED else None


_LONGEST_US: Final = {
    Period.SECOND: US_PER_S,
    Period.MINUTE: 60 * US_PER_S,
    Period.HOUR: 3_600 * US_PER_S,
    Period.DAY: 86_400 * US_PER_S,
    Period.WEEK: 604_800 * US_PER_S,
    Period.MONTH: 31 * 86_400 * US_PER_S,
    Period.YEAR: 366 * 86_400 * US_PER_S,
}
_FIXED: Final = frozenset((Period.SECOND, Period.MINUTE, Period.HOUR))


class PeriodAnchor(msgspec.Struct, frozen=True, gc=False):
    """When periods begin: years on a day of a month, months on that day, weeks on a weekday, all at 00:00 in a time zone.

    Args:
        month: 1 to 12.
        day: 1 to 31; the month's last day in months that are shorter.
        weekday: 0 for Monday to 6 for Sunday.
        timezone: name in the IANA database, such as `Europe/Berlin`.
    """

    month: int = 1
    day: int = 1
    weekday: int = 0
    timezone: str = "UTC"

    @classmethod
    def make(cls, date: object = None, timezone: object = "UTC") -> PeriodAnchor:
        """Validate an anchor.

        Args:
            date: a date or its text, such as `2026-01-31`: months begin on its day, years on its day and month, weeks on its
                weekday. None for months that begin on the 1st, years in January and weeks on Monday.
            timezone: see the class.

        Raises:
            PolicyError: naming the value and the remedy.
        """
        zone_of(timezone)
        assert isinstance(timezone, str)
        if date is None:
            return cls(timezone=timezone)
        found = _date_of(date)
        if found is None:
            raise PolicyError(f"anchor {_short(date)} is not a date: write it as year-month-day, for example 2026-01-31")
        return cls(found.month, found.day, found.weekday(), timezone)

    def bounds(self, period: Period, now_us: int) -> tuple[int, int]:
        """The period that contains a moment.

        Args:
            period: its kind.
            now_us: µs since the epoch, years 1970 to 9990.

        Returns:
            Start (inside) and end (outside), µs since the epoch. Costs about 10 µs where it has to be computed.
        """
        _, start, end, _ = self.boundaries(period, now_us)
        return start, end

    def boundaries(self, period: Period, now_us: int) -> tuple[int, int, int, int]:
        """The boundaries of the periods around a moment.

        Args:
            period: its kind.
            now_us: µs since the epoch, years 1970 to 9990.

        Returns:
            Start of the period before, start of the period that contains the moment, its end, and the end of the next one, µs
            since the epoch, each later than the one before.
        """
        length = period.fixed_us
        if length is not None:
            start = now_us - now_us % length
            return start - length, start, start + length, start + 2 * length
        zone = zone_of(self.timezone)
        local = (_EPOCH + now_us * _MICROSECOND).astimezone(zone).date()
        # Two periods around the local date contain the moment whatever the zone; a day that a zone left out has no length.
        starts = sorted({_midnight_us(date, zone) for date in self._dates(period, local)})
        at = max(place for place, start in enumerate(starts) if start <= now_us)
        return starts[at - 1], starts[at], starts[at + 1], starts[at + 2]

    def _dates(self, period: Period, around: datetime.date) -> list[datetime.date]:
        """Dates on which periods begin, from three before a date to four after it."""
        numbers = range(-3, 5)
        if period is Period.DAY:
            return [around + number * _DAY for number in numbers]
        if period is Period.WEEK:
            first = around - (around.weekday() - self.weekday) % 7 * _DAY
            return [first + 7 * number * _DAY for number in numbers]
        if period is Period.MONTH:
            months = (around.year * 12 + around.month - 1 + number for number in numbers)
            return [_clamped(month // 12, month % 12 + 1, self.day) for month in months]
        return [_clamped(around.year + number, self.month, self.day) for number in numbers]


DEFAULT_ANCHOR: Final = PeriodAnchor()


def zone_of(timezone: object) -> datetime.tzinfo:
    """A time zone by its name.

    Args:
        timezone: name in the IANA database.

    Raises:
        PolicyError: if there is none of that name.
    """
    if timezone == "UTC":
        return datetime.UTC
    # A name is a path below the database's directory: only what looks like a name is opened.
    if isinstance(timezone, str) and len(timezone) <= _MAX_TIMEZONE:
        found = _zone(timezone)
        if found is not None:
            return found
    raise PolicyError(
        f"timezone {_short(timezone)} is not in the IANA time zone database of this system: write a name such as 'Europe/Berlin' "
        "or 'UTC'; where the database is missing: pip install tzdata"
    )


@lru_cache(maxsize=1024)
def _zone(name: str) -> zoneinfo.ZoneInfo | None:
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        return None


def _midnight_us(date: datetime.date, zone: datetime.tzinfo) -> int:
    """The first moment of a day in a zone, µs since the epoch."""
    midnight = datetime.datetime.combine(date, datetime.time(), zone)
    # Where clocks are set forward over midnight, this is the moment at which they are.
    return (midnight - _EPOCH) // _MICROSECOND


def _clamped(year: int, month: int, day: int) -> datetime.date:
    return datetime.date(year, month, min(day, monthrange(year, month)[1]))


def _date_of(value: object) -> datetime.date | None:
    if isinstance(value, datetime.datetime):
        return None
    if isinstance(value, datetime.date):
        return value
    if isinstance(value, str) and len(value) == 10:
        try:
            return datetime.date.fromisoformat(value)
        except ValueError:
            return None
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
