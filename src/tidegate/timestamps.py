"""Timestamps: integer microseconds since the epoch inside, ISO 8601 outside."""

from __future__ import annotations

import datetime
import time
from typing import Final, overload

from tidegate.errors import BadRequest

US_PER_S: Final = 1_000_000
MIN_US: Final = -62_135_596_800_000_000
"""0001-01-01T00:00:00Z, µs since the epoch: the earliest time with a four-digit year."""
MAX_US: Final = 253_402_300_799_999_999
"""9999-12-31T23:59:59.999999Z: the latest time with a four-digit year."""

_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def now_us() -> int:
    """The current time, µs since the epoch."""
    return time.time_ns() // 1000


@overload
def format_timestamp(at_us: int) -> str: ...
@overload
def format_timestamp(at_us: None) -> None: ...
@overload
def format_timestamp(at_us: int | None) -> str | None: ...
def format_timestamp(at_us: int | None) -> str | None:
    """Format a timestamp as responses contain it.

    Args:
        at_us: µs since the epoch, or None.

    Returns:
        ISO 8601 in UTC, such as `2030-01-31T00:00:00Z`, the nearest that it can write; None for None.
    """
    if at_us is None:
        return None
    whole_s, rest_us = divmod(min(max(at_us, MIN_US), MAX_US), US_PER_S)
    moment = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=whole_s, microseconds=rest_us)
    return moment.isoformat() + "Z"


def to_us(moment: datetime.datetime) -> int:
    """µs since the epoch.

    Args:
        moment: with an offset; its time in UTC in the years 1 to 9999.

    Returns:
        The µs, exactly.

    Raises:
        ValueError: if it has no offset, or another year: an offset can carry it there.
    """
    if moment.tzinfo is None:
        raise ValueError("it has no offset")
    since = moment - _EPOCH
    at_us = (since.days * 86_400 + since.seconds) * US_PER_S + since.microseconds
    if not MIN_US <= at_us <= MAX_US:
        raise ValueError("it is not in the years 1 to 9999 of UTC")
    return at_us


def parse_timestamp(text: str, field: str) -> int:
    """Parse a timestamp.

    Args:
        text: ISO 8601 with an offset, such as `2030-01-31T00:00:00Z`.
        field: its name, for the error.

    Returns:
        µs since the epoch.

    Raises:
        BadRequest: naming the field, its value and the expected format.
    """
    try:
        return to_us(datetime.datetime.fromisoformat(text))
    except ValueError:
        raise BadRequest(
            f"{field} {text[:60]!r} is not a valid timestamp of the years 1 to 9999; "
            "use ISO 8601 with an offset, e.g. 2030-01-31T00:00:00Z",
            field=field,
        ) from None
