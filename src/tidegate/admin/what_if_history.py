"""What other limits of one rule would have done to the traffic history: bounds, because it has units per caller and hour.

Of windows of an hour or more the units of each caller are known. Of shorter ones only bounds are: the least is blocked if a
caller's units came evenly over the hour, the most if they came at once. Both are given.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final

from sqlalchemy import select

from tidegate.catalog.sql.database import Database
from tidegate.catalog.sql.tables import traffic_callers
from tidegate.errors import BadRequest
from tidegate.policy.limits import Limit
from tidegate.policy.rules import Mode, Rule
from tidegate.time_slice import TimeSlice
from tidegate.timestamps import US_PER_S, now_us

DAYS: Final = 7
MAX_ROWS: Final = 50_000
"""Maximum number of pairs of caller and hour that are read: the latest ones."""
TOP: Final = 10

_HOUR_S: Final = 3_600
NOTE: Final = (
    "From units per caller and hour of the last {days} days, {rows} of them. The lower figure holds if each caller's requests "
    "came evenly within the hour, the higher one if they came all at once. Other rules and costs of single requests are not "
    "considered: an access log shows more."
)


class _Bounds:
    """Blocked units, at least and at most."""

    __slots__ = ("least", "most", "units")

    def __init__(self) -> None:
        self.units = self.least = self.most = 0


async def estimate(database: Database, tier: str, before: Rule, after: Rule) -> dict[str, Any]:
    """Estimate what a changed rule would have blocked.

    Args:
        before: the rule as it is.
        after: the rule as it would be.

    Returns:
        Two reports, as `tidegate simulate` makes them, and a note on what they can tell.

    Raises:
        BadRequest: if the history has no unit of the rule.
        CatalogUnavailable: if the database does not answer.
    """
    c = traffic_callers.c
    units = (c.allowed + c.blocked).label("units")
    since = now_us() - DAYS * 86_400 * US_PER_S
    query = select(c.hour_us, c.subject, units, c.blocked).where(c.tier == tier, c.rule == before.name, c.hour_us >= since)
    async with database.reading() as connection:
        rows = (await connection.execute(query.order_by(c.hour_us.desc()).limit(MAX_ROWS))).all()
    if not rows:
        kept = "shadow rules are not in it" if before.mode is Mode.SHADOW else "it begins with the first request after an upgrade"
        raise BadRequest(f"the traffic history has no request that this rule answered ({kept}): send an access log", field="log")
    hours: defaultdict[str, dict[int, int]] = defaultdict(dict)
    for row in rows:
        hours[row.subject][row.hour_us // US_PER_S] = int(row.units)
    recorded = sum(int(row.blocked) for row in rows)
    total = sum(sum(of_subject.values()) for of_subject in hours.values())
    changed = _Bounds()
    top: Counter[str] = Counter()
    slice_ = TimeSlice()
    for subject, of_subject in hours.items():
        if slice_.over:
            await slice_.pause()
        least, most = blocked_bounds(of_subject, after.limits) if after.mode is not Mode.SHADOW else (0, 0)
        changed.least += least
        changed.most += most
        if most:
            top[subject] = most
    note = NOTE.format(days=DAYS, rows=len(rows))
    return {
        "before": _report(tier, before, total, recorded, recorded, ()),
        "after": _report(tier, after, total, changed.least, changed.most, top.most_common(TOP)),
        "note": note,
    }


def blocked_bounds(units_by_hour: dict[int, int], limits: Iterable[Limit]) -> tuple[int, int]:
    """How many units of one subject limits would have blocked, at least and at most.

    Args:
        units_by_hour: by the hour's start, s since the epoch.
        limits: all of which must pass.

    Returns:
        Bounds for windows that begin at multiples of their length.
    """
    total = sum(units_by_hour.values())
    least = most = 0
    for limit in limits:
        window_s = limit.window_us // US_PER_S
        low = high = 0
        if window_s < _HOUR_S:
            for units in units_by_hour.values():
                low += max(0, units - limit.capacity * -(-_HOUR_S // window_s))
                high += max(0, units - limit.capacity)
        else:
            windows: Counter[int] = Counter()
            for start_s, units in units_by_hour.items():
                windows[start_s // window_s] += units
            low = high = sum(max(0, units - limit.capacity) for units in windows.values())
        least, most = max(least, low), most + high
    return least, min(most, total)


def _report(tier: str, rule: Rule, requests: int, blocked: int, at_most: int, top: Sequence[tuple[str, int]]) -> dict[str, Any]:
    row = {"rule": rule.name, "endpoint": rule.endpoint, "tier": tier, "mode": rule.mode.value, "requests": requests}
    counts = {"blocked": blocked, "blocked_at_most": at_most}
    return {
        "requests": requests,
        **counts,
        "rules": [{**row, **counts}],
        "top_blocked": [{"subject": subject[2:], "rule": rule.name, "blocked": most} for subject, most in top],
    }
