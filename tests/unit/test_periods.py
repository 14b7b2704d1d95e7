"""Periods of quotas: anchors, time zones, leap years and changes of the clock."""

from __future__ import annotations

import datetime
import zoneinfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import PolicyError
from tidegate.policy.periods import Period, PeriodAnchor

S = 1_000_000
ZONES = (
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Asia/Kolkata",
    "Asia/Beirut",
    "America/Havana",
    "Pacific/Apia",
    "Africa/Cairo",
)


def us(text: str) -> int:
    return int(datetime.datetime.fromisoformat(text).timestamp()) * S


@pytest.mark.parametrize(
    ("date", "zone", "period", "now", "start", "end"),
    [
        (None, "UTC", Period.MONTH, "2026-11-30T12:00Z", "2026-11-01T00:00Z", "2026-12-01T00:00Z"),
        (None, "UTC", Period.YEAR, "2026-11-30T12:00Z", "2026-01-01T00:00Z", "2027-01-01T00:00Z"),
        # 30 November 2026 is a Monday.
        (None, "UTC", Period.WEEK, "2026-12-06T23:59Z", "2026-11-30T00:00Z", "2026-12-07T00:00Z"),
        (None, "UTC", Period.HOUR, "2026-11-30T12:34Z", "2026-11-30T12:00Z", "2026-11-30T13:00Z"),
        # 31 is the last day of shorter months.
        ("2026-01-31", "UTC", Period.MONTH, "2026-02-27T23:59Z", "2026-01-31T00:00Z", "2026-02-28T00:00Z"),
        ("2026-01-31", "UTC", Period.MONTH, "2026-02-28T00:00Z", "2026-02-28T00:00Z", "2026-03-31T00:00Z"),
        ("2026-01-31", "UTC", Period.MONTH, "2028-02-28T12:00Z", "2028-01-31T00:00Z", "2028-02-29T00:00Z"),
        # 29 February is 28 February in other years.
        ("2024-02-29", "UTC", Period.YEAR, "2026-03-01T00:00Z", "2026-02-28T00:00Z", "2027-02-28T00:00Z"),
        ("2024-02-29", "UTC", Period.YEAR, "2027-12-01T00:00Z", "2027-02-28T00:00Z", "2028-02-29T00:00Z"),
        # Weeks begin on the anchor's weekday: 31 January 2026 is a Saturday.
        ("2026-01-31", "UTC", Period.WEEK, "2026-02-06T23:00Z", "2026-01-31T00:00Z", "2026-02-07T00:00Z"),
        # In Berlin the month has begun an hour or two before UTC.
        ("2026-01-01", "Europe/Berlin", Period.MONTH, "2026-06-30T22:30Z", "2026-07-01T00:00+02:00", "2026-08-01T00:00+02:00"),
        ("2026-01-01", "Europe/Berlin", Period.MONTH, "2026-10-15T00:00Z", "2026-10-01T00:00+02:00", "2026-11-01T00:00+01:00"),
        # Days of 23 and 25 hours.
        (None, "Europe/Berlin", Period.DAY, "2026-03-29T12:00Z", "2026-03-29T00:00+01:00", "2026-03-30T00:00+02:00"),
        (None, "Europe/Berlin", Period.DAY, "2026-10-25T12:00Z", "2026-10-25T00:00+02:00", "2026-10-26T00:00+01:00"),
        # Clocks are set from 00:00 to 01:00 there: the day begins with the first moment that it has.
        (None, "Africa/Cairo", Period.DAY, "2026-04-24T12:00Z", "2026-04-24T01:00+03:00", "2026-04-25T00:00+03:00"),
        # Midnight twice: the day begins with the first one.
        (None, "America/Havana", Period.DAY, "2026-11-01T12:00Z", "2026-11-01T00:00-04:00", "2026-11-02T00:00-05:00"),
        # A day that was left out.
        (None, "Pacific/Apia", Period.DAY, "2011-12-30T12:00Z", "2011-12-31T00:00+14:00", "2012-01-01T00:00+14:00"),
    ],
)
def test_bounds(date: str | None, zone: str, period: Period, now: str, start: str, end: str) -> None:
    assert PeriodAnchor.make(date, zone).bounds(period, us(now)) == (us(start), us(end))


@given(
    st.dates(datetime.date(1996, 1, 1), datetime.date(2036, 12, 31)),
    st.sampled_from(ZONES),
    st.sampled_from(list(Period)),
    st.integers(us("1999-01-01T00:00Z"), us("2040-01-01T00:00Z")),
)
def test_periods_are_contiguous_and_begin_at_midnight(date: datetime.date, zone: str, period: Period, now: int) -> None:
    anchor = PeriodAnchor.make(date, zone)
    before, start, end, after = anchor.boundaries(period, now)
    assert before < start <= now < end < after
    assert anchor.bounds(period, start) == anchor.bounds(period, end - 1) == (start, end)
    assert anchor.bounds(period, start - 1) == (before, start)
    assert anchor.bounds(period, end) == (end, after)
    if period.fixed_us is None:
        local = datetime.datetime.fromtimestamp(start // S, zoneinfo.ZoneInfo(zone))
        just_before = datetime.datetime.fromtimestamp(start // S - 1, zoneinfo.ZoneInfo(zone))
        assert local.date() > just_before.date(), "a period begins with a day"
        if period in (Period.MONTH, Period.YEAR):
            last = (local.replace(day=28) + datetime.timedelta(days=4)).replace(day=1) - datetime.timedelta(days=1)
            assert local.day == min(date.day, last.day)
            assert period is Period.MONTH or local.month == date.month
        elif period is Period.WEEK and zone != "Pacific/Apia":
            assert local.weekday() == date.weekday()
    else:
        assert end - start == period.fixed_us


@pytest.mark.parametrize("date", ["2026-02-30", "31", "20260131", 31, "2026-1-31", datetime.datetime(2026, 1, 31)])
def test_refuses_what_is_not_a_date(date: object) -> None:
    with pytest.raises(PolicyError, match="is not a date: write it as year-month-day"):
        PeriodAnchor.make(date)


@pytest.mark.parametrize(
    "zone", ["Mars/Olympus", "../etc/passwd", "/etc/passwd", "", "Europe", "x" * 100_000, None, "Europe/Berl\0in"]
)
def test_refuses_what_is_not_a_time_zone(zone: object) -> None:
    with pytest.raises(PolicyError, match="IANA time zone database"):
        PeriodAnchor.make("2026-01-31", zone)
