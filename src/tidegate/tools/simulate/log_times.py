"""Parsing of timestamps in logs to µs since the epoch, independent of the machine's time zone."""

from __future__ import annotations

import datetime
import re
from typing import Final

from tidegate.timestamps import US_PER_S

_APACHE: Final = re.compile(
    r"(\d{2})/([A-Z][a-z]{2})/(\d{4}):(\d{2}):(\d{2}):(\d{2})(?:[.,](\d{1,9}))? ([+-])(\d{2})(\d{2})", re.ASCII
)
_NUMBER: Final = re.compile(r"\d{1,19}(?:\.\d{0,9})?", re.ASCII)
_MONTHS: Final = {
    name: number
    for number, name in enumerate(["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"], 1)
}
# 60 is a leap second: the first of the next minute.
_SECONDS: Final = {f"{second:02}": second * US_PER_S for second in range(61)}
_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_END_US: Final = 253_402_214_400 * US_PER_S
"""The last day of the year 9999: later times have no date."""
_MAX_CACHED: Final = 10_000


class Malformed(Exception):
    """A line that is not a request; the message is the reason."""


class ApacheTimes:
    """`17/May/2015:10:05:03 +0000` → µs. Each minute is parsed once; up to 10,000 are cached."""

    def __init__(self) -> None:
        self._minutes: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        """Parse a timestamp without its brackets to µs since the epoch.

        Raises:
            Malformed: if it is not a timestamp.
        """
        minute = self._minutes.get(text[:18] + text[20:])
        second = _SECONDS.get(text[18:20])
        # With a fraction of a second `text[20:]` starts with it and is never in the cache.
        if minute is None or second is None:
            return self._parse(text)
        return minute + second

    def _parse(self, text: str) -> int:
        match = _APACHE.fullmatch(text)
        if match is None or match[2] not in _MONTHS or match[6] not in _SECONDS:
            raise Malformed(f"the time {text[:40]!r} is not a valid timestamp")
        offset = datetime.timedelta(hours=int(match[9]), minutes=int(match[10]))
        try:
            moment = datetime.datetime(
                int(match[3]), _MONTHS[match[2]], int(match[1]), int(match[4]), int(match[5]), tzinfo=datetime.UTC
            )
            moment = moment - offset if match[8] == "+" else moment + offset
        except (ValueError, OverflowError):
            raise Malformed(f"the time {text!r} is not a valid timestamp") from None
        start = _us_of(moment)
        if match[7]:
            return start + _SECONDS[match[6]] + int(match[7][:6].ljust(6, "0"))
        if len(self._minutes) >= _MAX_CACHED:
            self._minutes.clear()
        self._minutes[text[:18] + text[20:]] = start
        return start + _SECONDS[match[6]]


_apache_times: Final = ApacheTimes()


def timestamp_us(value: object) -> int:
    """Parse a timestamp in any of the usual forms to µs since the epoch.

    Args:
        value: ISO 8601 (UTC without an offset); s, ms, µs or ns since the epoch as number or text, distinguished by size; or
            the Apache format.

    Raises:
        Malformed: if it is not a timestamp from 1970 to 9999.
    """
    if isinstance(value, str):
        text = value.strip("[] ")
        if _NUMBER.fullmatch(text):
            return _of_number(float(text), value)
        if "/" in text:
            return _apache_times(text)
        if text[10:11] == " " and text.endswith(" UTC"):
            text = text[:-4] + "Z"
        try:
            moment = datetime.datetime.fromisoformat(text)
            # A time without offset is UTC, so that the result is the same on every machine.
            return _us_of(moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC))
        except (ValueError, OverflowError):
            raise Malformed(f"the time {value[:40]!r} is not a valid timestamp") from None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _of_number(value, value)
    raise Malformed(f"the time {str(value)[:40]!r} is not a valid timestamp")


def _of_number(number: float, value: object) -> int:
    """Seconds reach 1e11 in the year 5138, milliseconds did so in 1973: the ranges do not overlap for real logs."""
    if 0 <= number < 1e11:
        return _within(round(number * US_PER_S))
    if 0 <= number < 1e20:
        return _within(round(number * 1_000) if number < 1e14 else round(number) if number < 1e17 else round(number / 1_000))
    raise Malformed(
        f"the time {str(value)[:40] if -1e20 < number < 1e20 else 'of this magnitude'} is outside the years 1970 to 9999"
    )


def _us_of(moment: datetime.datetime) -> int:
    since = moment - _EPOCH
    return _within((since.days * 86_400 + since.seconds) * US_PER_S + since.microseconds)


def _within(at_us: int) -> int:
    if not 0 <= at_us < _END_US:
        raise Malformed("the time is outside the years 1970 to 9999")
    return at_us
