"""How long a logged request took: what limits of requests in progress need to know."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from tidegate.timestamps import US_PER_S
from tidegate.tools.simulate.log_times import Malformed

UNITS: Final[Mapping[str, float]] = {"s": 1_000_000, "ms": 1_000, "us": 1, "ns": 0.001}
"""µs of each unit that durations may be logged in."""
LOGGED_AT: Final = ("start", "end")
UNKNOWN: Final = -1
"""The duration of a request that is not logged."""
MAX_DURATION_S: Final = 7 * 86_400
_NUMBER: Final = re.compile(r"\d{1,19}(?:\.\d{0,9})?", re.ASCII)
_STARTED: Final = frozenset({"start_time", "startutc", "requesttime"})


class Durations(NamedTuple):
    """Where a log has the duration of a request.

    Args:
        field: its name.
        unit: one of `UNITS`; text formats have their own.
        logged_at: whether the logged time is that of the request's `start` or `end`; None to go by format and field name.
    """

    field: str
    unit: str = "s"
    logged_at: str | None = None

    def is_end(self, time_field: str) -> bool:
        """Whether the time in a field is that at which requests ended."""
        return self.logged_at == "end" if self.logged_at else time_field.lower() not in _STARTED


def duration_of(value: object, unit: str) -> int:
    """The duration of a request from a logged value.

    Args:
        value: as logged.
        unit: one of `UNITS`.

    Returns:
        µs; `UNKNOWN` if there is no value.

    Raises:
        Malformed: if it is not a number from 0 to a week.
    """
    if value is None or value in ("", "-"):
        return UNKNOWN
    number = -1.0
    if type(value) is int or type(value) is float:
        number = value
    elif type(value) is str and _NUMBER.fullmatch(value):
        number = float(value)
    most = MAX_DURATION_S * US_PER_S / UNITS[unit]
    if not 0 <= number <= most:
        raise Malformed(f"the duration {str(value)[:40]!r} is not a number of {unit} from 0 to {most:,.0f}")
    return round(number * UNITS[unit])


def of_envoy(milliseconds: str) -> int:
    """µs from Envoy's DURATION."""
    return duration_of(milliseconds, "ms")


def of_haproxy(timers: str) -> int:
    """µs from HAProxy's timers, `TR/Tw/Tc/Tr/Ta`: the last one is the time from the first byte to the last."""
    last = timers.rpartition("/")[2].lstrip("+")
    return UNKNOWN if last.startswith("-") else duration_of(last, "ms")


def of_load_balancer(times: str) -> int:
    """µs from the three times of an AWS load balancer, in s; they are -1 where a request did not reach a target."""
    parts = times.split()[:3]
    return UNKNOWN if any(part.startswith("-") for part in parts) else sum(duration_of(part, "s") for part in parts)


OF_TEXT: Final = {"envoy": (of_envoy, False), "haproxy": (of_haproxy, False), "alb": (of_load_balancer, True)}
"""For each text format with durations: how they are read, and whether its time is that of the end."""
