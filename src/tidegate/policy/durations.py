"""Lengths of time as a policy writes them: `90s`, `5m`, `day`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from tidegate.timestamps import US_PER_S

UNITS_US: Final[Mapping[str, int]] = {
    unit: seconds * US_PER_S
    for seconds, units in (
        (1, ("s", "sec", "second", "seconds")),
        (60, ("m", "min", "minute", "minutes")),
        (3_600, ("h", "hour", "hours")),
        (86_400, ("d", "day", "days")),
        (604_800, ("w", "week", "weeks")),
    )
    for unit in units
}
_DURATION: Final = re.compile(r"\s*([0-9]{1,9})\s*([A-Za-z]+)\s*", re.ASCII)


def duration_s(text: object) -> int | None:
    """The seconds of a duration such as `90s` or `5m`; None for what is not one."""
    match = _DURATION.fullmatch(text) if isinstance(text, str) and len(text) <= 20 else None
    unit = None if match is None else UNITS_US.get(match[2].lower())
    return None if match is None or unit is None else int(match[1]) * unit // US_PER_S


def duration_text(seconds: int) -> str:
    """The shortest text of a duration that `duration_s` reads."""
    text = window_text(seconds)
    return text if text[0].isdigit() else f"1{text[0]}"


def window_text(seconds: int) -> str:
    """The shortest text of a window's length: a unit, or a number and a unit."""
    for length, unit, short in ((86_400, "day", "d"), (3_600, "hour", "h"), (60, "minute", "m"), (1, "second", "s")):
        if seconds == length:
            return unit
        if seconds % length == 0:
            return f"{seconds // length}{short}"
    raise AssertionError(seconds)
