"""Steps of checks against quotas: the same table runs in memory and on Redis.

A case is a name and its steps. A step is the quotas with their overage in percent (None: denied above, 0: without end), the
anchor's date and time zone, a moment, a cost, and what is expected: whether it passes, what remains, the overage, and until when
that holds.
"""

from __future__ import annotations

import datetime
from typing import Final, NamedTuple

from tidegate.policy.limits import LimitSet
from tidegate.policy.periods import PeriodAnchor
from tidegate.policy.quotas import CompiledQuotas, Overage, fit_quotas


class Step(NamedTuple):
    quotas: tuple[str, ...]
    overage: int | None
    anchor: tuple[str | None, str]
    at: str
    cost: int
    allowed: bool
    remaining: int
    over: int = 0
    resets: str = ""

    @property
    def limits(self) -> LimitSet:
        return quotas_of(self.quotas, self.overage, *self.anchor)

    @property
    def at_us(self) -> int:
        return us(self.at)


def quotas_of(texts: tuple[str, ...], overage: int | None = None, date: str | None = None, zone: str = "UTC") -> LimitSet:
    above = None if overage is None else Overage(overage or None)
    return CompiledQuotas(fit_quotas(texts), above, None, "pro").of(PeriodAnchor.make(date, zone))


def us(text: str) -> int:
    return round(datetime.datetime.fromisoformat(text).timestamp() * 1_000_000)


MONTH: Final = ("10/month",)
FIRST: Final = (None, "UTC")
LAST_DAY: Final = ("2026-01-31", "UTC")
BERLIN: Final = (None, "Europe/Berlin")

CASES: Final[dict[str, list[Step]]] = {
    "a month begins anew on the 1st": [
        Step(MONTH, None, FIRST, "2026-10-31T23:59:59Z", 10, True, 0, 0, "2026-11-01T00:00Z"),
        Step(MONTH, None, FIRST, "2026-10-31T23:59:59Z", 1, False, 0, 0, "2026-11-01T00:00Z"),
        Step(MONTH, None, FIRST, "2026-11-01T00:00Z", 10, True, 0, 0, "2026-12-01T00:00Z"),
    ],
    "the 31st is the last day of shorter months": [
        Step(MONTH, None, LAST_DAY, "2026-02-27T12:00Z", 9, True, 1, 0, "2026-02-28T00:00Z"),
        Step(MONTH, None, LAST_DAY, "2026-02-28T00:00Z", 4, True, 6, 0, "2026-03-31T00:00Z"),
        Step(MONTH, None, LAST_DAY, "2026-03-30T23:59Z", 7, False, 6, 0, "2026-03-31T00:00Z"),
        Step(MONTH, None, LAST_DAY, "2026-03-31T00:00Z", 7, True, 3, 0, "2026-04-30T00:00Z"),
    ],
    "29 February": [
        Step(("5/year",), None, ("2024-02-29", "UTC"), "2027-12-31T00:00Z", 5, True, 0, 0, "2028-02-29T00:00Z"),
        Step(("5/year",), None, ("2024-02-29", "UTC"), "2028-02-28T23:00Z", 1, False, 0, 0, "2028-02-29T00:00Z"),
        Step(("5/year",), None, ("2024-02-29", "UTC"), "2028-02-29T00:00Z", 1, True, 4, 0, "2029-02-28T00:00Z"),
    ],
    "days of 23 and 25 hours": [
        Step(("3/day",), None, BERLIN, "2026-03-29T00:00+01:00", 3, True, 0, 0, "2026-03-29T22:00Z"),
        Step(("3/day",), None, BERLIN, "2026-03-29T21:59:59Z", 1, False, 0, 0, "2026-03-29T22:00Z"),
        Step(("3/day",), None, BERLIN, "2026-03-29T22:00Z", 1, True, 2, 0, "2026-03-30T22:00Z"),
        Step(("3/day",), None, BERLIN, "2026-10-25T00:00+02:00", 3, True, 0, 0, "2026-10-25T23:00Z"),
        Step(("3/day",), None, BERLIN, "2026-10-25T22:59:59Z", 1, False, 0, 0, "2026-10-25T23:00Z"),
    ],
    "weeks begin on Monday": [
        Step(("3/week",), None, FIRST, "2026-11-29T23:00Z", 3, True, 0, 0, "2026-11-30T00:00Z"),
        Step(("3/week",), None, FIRST, "2026-11-30T00:00Z", 3, True, 0, 0, "2026-12-07T00:00Z"),
    ],
    "hours, minutes and seconds": [
        Step(("3/hour",), None, BERLIN, "2026-11-30T12:59:59Z", 3, True, 0, 0, "2026-11-30T13:00Z"),
        Step(("3/hour",), None, BERLIN, "2026-11-30T13:00Z", 1, True, 2, 0, "2026-11-30T14:00Z"),
        Step(("3/second", "4/minute"), None, BERLIN, "2026-11-30T13:00Z", 3, True, 0, 0, "2026-11-30T13:00:01Z"),
        Step(("3/second", "4/minute"), None, BERLIN, "2026-11-30T13:00:01Z", 2, False, 1, 0, "2026-11-30T13:01Z"),
    ],
    "a denied check consumes nothing in any quota": [
        Step(("10/month", "3/day"), None, FIRST, "2026-11-01T01:00Z", 4, False, 3),
        Step(("10/month", "3/day"), None, FIRST, "2026-11-01T01:00Z", 3, True, 0, 0, "2026-11-02T00:00Z"),
        Step(("10/month", "3/day"), None, FIRST, "2026-11-02T01:00Z", 3, True, 0, 0, "2026-11-03T00:00Z"),
        Step(("10/month", "3/day"), None, FIRST, "2026-11-03T01:00Z", 3, True, 0, 0, "2026-11-04T00:00Z"),
        Step(("10/month", "3/day"), None, FIRST, "2026-11-04T01:00Z", 2, False, 1, 0, "2026-12-01T00:00Z"),
        Step(("10/month", "3/day"), None, FIRST, "2026-11-04T01:00Z", 1, True, 0, 0, "2026-12-01T00:00Z"),
    ],
    "a limit that changes keeps what was consumed": [
        Step(MONTH, None, FIRST, "2026-11-01T01:00Z", 8, True, 2, 0, "2026-12-01T00:00Z"),
        Step(("12/month",), None, FIRST, "2026-11-01T02:00Z", 1, True, 3, 0, "2026-12-01T00:00Z"),
        Step(("5/month",), None, FIRST, "2026-11-01T03:00Z", 1, False, 0, 0, "2026-12-01T00:00Z"),
        Step(("20/month", "50/day"), None, FIRST, "2026-11-01T04:00Z", 1, True, 10, 0, "2026-12-01T00:00Z"),
    ],
    "an anchor that moves in mid-period grants nothing twice": [
        Step(MONTH, None, FIRST, "2026-11-20T00:00Z", 8, True, 2, 0, "2026-12-01T00:00Z"),
        Step(MONTH, None, ("2026-01-15", "UTC"), "2026-11-20T00:00Z", 3, False, 2, 0, "2026-12-15T00:00Z"),
        Step(MONTH, None, ("2026-01-15", "UTC"), "2026-12-14T23:00Z", 3, False, 2, 0, "2026-12-15T00:00Z"),
        Step(MONTH, None, ("2026-01-15", "UTC"), "2026-12-14T23:00Z", 2, True, 0, 0, "2026-12-15T00:00Z"),
        Step(MONTH, None, ("2026-01-15", "UTC"), "2026-12-15T00:00Z", 10, True, 0, 0, "2027-01-15T00:00Z"),
        Step(MONTH, None, ("2026-01-15", "Asia/Kolkata"), "2026-12-15T01:00Z", 1, False, 0, 0, "2027-01-14T18:30Z"),
    ],
    "overage up to 20 %": [
        Step(MONTH, 20, FIRST, "2026-11-01T01:00Z", 9, True, 1, 0, "2026-12-01T00:00Z"),
        Step(MONTH, 20, FIRST, "2026-11-01T01:00Z", 2, True, 0, 1, "2026-12-01T00:00Z"),
        Step(MONTH, 20, FIRST, "2026-11-01T01:00Z", 2, False, 0, 0, "2026-12-01T00:00Z"),
        Step(MONTH, 20, FIRST, "2026-11-01T01:00Z", 1, True, 0, 1, "2026-12-01T00:00Z"),
        Step(MONTH, 20, FIRST, "2026-11-01T01:00Z", 0, True, 0, 2, "2026-12-01T00:00Z"),
        Step(MONTH, 20, FIRST, "2026-11-01T01:00Z", 1, False, 0, 0, "2026-12-01T00:00Z"),
        Step(MONTH, 20, FIRST, "2026-11-01T01:00Z", 13, False, 0, 0, ""),
        Step(MONTH, 20, FIRST, "2026-12-01T00:00Z", 12, True, 0, 2, "2027-01-01T00:00Z"),
    ],
    "overage without end": [
        Step(MONTH, 0, FIRST, "2026-11-01T01:00Z", 10, True, 0, 0, "2026-12-01T00:00Z"),
        Step(MONTH, 0, FIRST, "2026-11-01T01:00Z", 1_000_000_000, True, 0, 1_000_000_000, "2026-12-01T00:00Z"),
        Step(MONTH, 0, FIRST, "2026-11-01T01:00Z", 1, True, 0, 1, "2026-12-01T00:00Z"),
        Step(MONTH, None, FIRST, "2026-11-01T01:00Z", 1, False, 0, 0, "2026-12-01T00:00Z"),
    ],
    "a clock that goes back": [
        Step(("3/day",), None, FIRST, "2026-11-02T00:00Z", 2, True, 1, 0, "2026-11-03T00:00Z"),
        Step(("3/day",), None, FIRST, "2026-11-01T23:00Z", 1, True, 0, 0, "2026-11-03T00:00Z"),
        Step(("3/day",), None, FIRST, "2026-11-02T00:00Z", 1, False, 0, 0, "2026-11-03T00:00Z"),
    ],
}
