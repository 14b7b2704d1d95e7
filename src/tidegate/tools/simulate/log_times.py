"""Moments as logs write them → µs since the epoch. The machine's own timezone plays no part."""

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
"""The last day of the year 9999: what lies beyond it cannot be written as a date."""
_KEPT: Final = 10_000


class Malformed(Exception):
    """A line that is no request; the message says why."""


class ApacheTimes:
    """`17/May/2015:10:05:03 +0000` → µs. Each minute is worked out once; the last 10,000 or so are remembered."""

    def __init__(self) -> None:
        self._minutes: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        """The moment of a text.

        Args:
            text: as it stood in the log, without brackets.

        Returns:
            µs since the epoch.

        Raises:
            Malformed: if it is no moment.
        """
        minute = self._minutes.get(text[:18] + text[20:])
        second = _SECONDS.get(text[18:20])
        # With a fraction of a second `text[20:]` begins with it and is never found.
        if minute is None or second is None:
            return self._work_out(text)
        return minute + second

    def _work_out(self, text: str) -> int:
        found = _APACHE.fullmatch(text)
        if found is None or found[2] not in _MONTHS or found[6] not in _SECONDS:
            raise Malformed(f"the time {text[:40]!r} is not understood")
        offset = datetime.timedelta(hours=int(found[9]), minutes=int(found[10]))
        try:
            moment = datetime.datetime(
                int(found[3]), _MONTHS[found[2]], int(found[1]), int(found[4]), int(found[5]), tzinfo=datetime.UTC
            )
            moment = moment - offset if found[8] == "+" else moment + offset
        except (ValueError, OverflowError):
            raise Malformed(f"the time {text!r} is no moment") from None
        start = _us_of(moment)
        if found[7]:
            return start + _SECONDS[found[6]] + int(found[7][:6].ljust(6, "0"))
        if len(self._minutes) >= _KEPT:
            self._minutes.clear()
        self._minutes[text[:18] + text[20:]] = start
        return start + _SECONDS[found[6]]


_apache_times: Final = ApacheTimes()


def moment_us(value: object) -> int:
    """A moment in any of the usual forms.

    Args:
        value: ISO 8601 (UTC where it has no offset); s, ms, µs or ns since the epoch as number or text, told apart by their
            size; or as Apache writes it.

    Returns:
        µs since the epoch.

    Raises:
        Malformed: if it is no moment from 1970 to 9999.
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
            raise Malformed(f"the time {value[:40]!r} is not understood") from None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _of_number(value, value)
    raise Malformed(f"the time {str(value)[:40]!r} is not understood")


def _of_number(number: float, value: object) -> int:
    """Seconds reach 1e11 in the year 5138, milliseconds in 1973: so sizes do not overlap for any log there is."""
    if 0 <= number < 1e11:
        return _within(round(number * US_PER_S))
    if 0 <= number < 1e20:
        return _within(round(number * 1_000) if number < 1e14 else round(number) if number < 1e17 else round(number / 1_000))
    raise Malformed(
        f"the time {str(value)[:40] if -1e20 < number < 1e20 else 'of such size'} lies outside the years 1970 to 9999"
    )


def _us_of(moment: datetime.datetime) -> int:
    since = moment - _EPOCH
    return _within((since.days * 86_400 + since.seconds) * US_PER_S + since.microseconds)


def _within(at_us: int) -> int:
    if not 0 <= at_us < _END_US:
        raise Malformed("the time lies outside the years 1970 to 9999")
    return at_us
