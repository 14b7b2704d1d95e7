"""What operators read of violations: page by page as in `reading`, and summed up."""

from __future__ import annotations

import base64
import binascii
from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, and_, func, or_, select, tuple_

from tidegate.catalog.sql.database import Database
from tidegate.catalog.sql.paging import Page, no_place, rows_of
from tidegate.catalog.sql.tables import rate_limit_violations
from tidegate.timestamps import format_timestamp
from tidegate.violations.storage import OTHERS

DAY_US: Final = 86_400_000_000


class Blocked(msgspec.Struct, frozen=True):
    """Which violations are meant.

    Args:
        since_us: from this minute on, µs since the epoch.
        until_us: before this moment.
        subject: only of this subject: `k:` and a key's id, `i:` and an address, `t:` and a tier.
    """

    since_us: int
    until_us: int
    tier: str | None = None
    rule: str | None = None
    subject: str | None = None


async def list_violations(database: Database, limit: int, after: str | None, blocked: Blocked) -> Page[dict[str, Any]]:
    """Violations, one item for each minute in which a rule blocked a subject, the newest first.

    Raises:
        BadRequest: if `after` is none of this list.
        CatalogUnavailable: if the database does not answer.
    """
    c = rate_limit_violations.c
    query = select(rate_limit_violations).where(*_meant(blocked)).order_by(c.minute_us.desc(), c.tier, c.rule, c.subject)
    if after is not None:
        minute_us, tier, rule, subject = _place(after)
        behind = and_(c.minute_us == minute_us, tuple_(c.tier, c.rule, c.subject) > tuple_(tier, rule, subject))
        # The first condition says nothing new, but is one that an index answers.
        query = query.where(c.minute_us <= minute_us, or_(c.minute_us < minute_us, behind))
    rows = await rows_of(database, query, limit)
    items = [
        {
            "minute": format_timestamp(row["minute_us"]),
            "tier": row["tier"],
            "rule": row["rule"],
            "subject": row["subject"],
            "blocked": row["blocked"],
        }
        for row in rows[:limit]
    ]
    last = rows[limit - 1] if len(rows) > limit else None
    return Page(items, None if last is None else _cursor([last["minute_us"], last["tier"], last["rule"], last["subject"]]))


async def top_violators(database: Database, limit: int, by: str, blocked: Blocked) -> list[dict[str, Any]]:
    """Who was blocked most.

    Args:
        by: subject, rule or tier: what is counted together.

    Returns:
        Forms of what it is and how often it was blocked, the most first.

    Raises:
        CatalogUnavailable: if the database does not answer.
    """
    columns = {
        "subject": (rate_limit_violations.c.subject,),
        "rule": (rate_limit_violations.c.tier, rate_limit_violations.c.rule),
        "tier": (rate_limit_violations.c.tier,),
    }[by]
    total = func.sum(rate_limit_violations.c.blocked).label("blocked")
    query = select(*columns, total).where(*_meant(blocked)).group_by(*columns).order_by(total.desc(), *columns)
    if by == "subject":
        # The others are nobody; by rule and by tier they count.
        query = query.where(rate_limit_violations.c.subject != OTHERS)
    rows = await rows_of(database, query, limit - 1)
    return [{"subject": None, "tier": None, "rule": None, **row, "blocked": int(row["blocked"])} for row in rows]


async def blocked_total(database: Database, blocked: Blocked) -> int:
    """How often something was blocked.

    Raises:
        CatalogUnavailable: if the database does not answer.
    """
    query = select(func.coalesce(func.sum(rate_limit_violations.c.blocked), 0)).where(*_meant(blocked))
    async with database.reading() as connection:
        return int((await connection.execute(query)).scalar_one())


def _meant(blocked: Blocked) -> list[ColumnElement[bool]]:
    c = rate_limit_violations.c
    conditions: list[ColumnElement[bool]] = [c.minute_us >= blocked.since_us, c.minute_us < blocked.until_us]
    for column, value in ((c.tier, blocked.tier), (c.rule, blocked.rule), (c.subject, blocked.subject)):
        if value is not None:
            conditions.append(column == value)
    return conditions


def _cursor(place: list[Any]) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(place)).decode().rstrip("=")


def _place(after: str) -> tuple[int, str, str, str]:
    try:
        raw = base64.urlsafe_b64decode(after + "=" * (-len(after) % 4))
        place = msgspec.json.decode(raw, type=tuple[int, str, str, str])
    except (ValueError, binascii.Error, msgspec.MsgspecError):
        raise no_place(after) from None
    if not 0 <= place[0] < 2**62 or any("\0" in text for text in place[1:]):
        raise no_place(after)
    return place
