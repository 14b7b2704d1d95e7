"""Reads violations for operators: pages, rankings and totals."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, Table, and_, case, func, or_, select, tuple_

from tidegate.catalog.sql.database import Database
from tidegate.catalog.sql.paging import Page, cursor_of, parse_cursor, rows_of
from tidegate.catalog.sql.tables import api_keys, customers, rate_limit_violations, shadow_violations
from tidegate.timestamps import format_timestamp
from tidegate.violations.storage import OTHERS

DAY_US: Final = 86_400_000_000


class ViolationFilter(msgspec.Struct, frozen=True):
    """Selects violations; None selects all.

    Args:
        since_us: from this time on, µs since the epoch.
        until_us: before this time, µs since the epoch.
        subject: `k:` and a key's id, `i:` and an address, `t:` and a tier, or `a:` and attributes.
        attributes: names of which a subject of attributes must have exactly these, sorted; none for all subjects. Long subjects,
            which are stored as a digest, are not found.
        shadow: what shadow rules would have blocked, in place of what was blocked.
    """

    since_us: int
    until_us: int
    tier: str | None = None
    rule: str | None = None
    subject: str | None = None
    attributes: tuple[str, ...] = ()
    shadow: bool = False

    @property
    def table(self) -> Table:
        """Where they are."""
        return shadow_violations if self.shadow else rate_limit_violations


class Violation(msgspec.Struct, frozen=True):
    """A minute in which a rule blocked a subject.

    Args:
        minute: ISO 8601.
        blocked: number of checks.
    """

    minute: str
    tier: str
    rule: str
    subject: str
    blocked: int


class Violator(msgspec.Struct, frozen=True):
    """How many checks were blocked; fields that they were not grouped by are None."""

    subject: str | None = None
    tier: str | None = None
    rule: str | None = None
    blocked: int = 0
    customer: str | None = None


async def list_violations(database: Database, limit: int, after: str | None, selected: ViolationFilter) -> Page[Violation]:
    """Violations, newest first.

    Raises:
        BadRequest: if `after` is not valid.
        CatalogUnavailable: if the database does not answer.
    """
    c = selected.table.c
    query = select(selected.table).where(*_conditions(selected)).order_by(c.minute_us.desc(), c.tier, c.rule, c.subject)
    if after is not None:
        minute_us, tier, rule, subject = parse_cursor(after, tuple[int, str, str, str])
        later = and_(c.minute_us == minute_us, tuple_(c.tier, c.rule, c.subject) > tuple_(tier, rule, subject))
        # The first condition is redundant, but an index supports it.
        query = query.where(c.minute_us <= minute_us, or_(c.minute_us < minute_us, later))
    rows = await rows_of(database, query, limit)
    items = [
        Violation(format_timestamp(row["minute_us"]), row["tier"], row["rule"], row["subject"], row["blocked"])
        for row in rows[:limit]
    ]
    last = rows[limit - 1] if len(rows) > limit else None
    return Page(items, None if last is None else cursor_of((last["minute_us"], last["tier"], last["rule"], last["subject"])))


async def top_violators(database: Database, limit: int, by: str, selected: ViolationFilter) -> list[Violator]:
    """What was blocked most, highest counts first.

    Args:
        by: subject, rule, tier or customer: the field to group by; violations of no customer are left out of the latter.

    Raises:
        CatalogUnavailable: if the database does not answer.
    """
    c = selected.table.c
    total = func.sum(c.blocked).label("blocked")
    columns: tuple[ColumnElement[Any], ...] = {
        "subject": (c.subject,),
        "rule": (c.tier, c.rule),
        "tier": (c.tier,),
        "customer": (_customer_of(c.subject),),
    }[by]
    query = select(*columns, total).where(*_conditions(selected))
    if by == "customer":
        # The customer of an API key now: of the first key of its chain of rotations, by which counters and rows are named.
        owner = api_keys.outerjoin(customers, customers.c.id == api_keys.c.customer_id)
        is_of_key = and_(c.subject.like("k:%"), api_keys.c.id == func.substr(c.subject, 3))
        query = query.select_from(selected.table.outerjoin(owner, is_of_key))
        query = query.where(columns[0].is_not(None))
    query = query.group_by(*columns).order_by(total.desc(), *columns)
    if by == "subject":
        # `OTHERS` is not a subject; grouped by rule or tier it counts.
        query = query.where(c.subject != OTHERS)
    rows = await rows_of(database, query, limit - 1)
    return [Violator(**{**row, "blocked": int(row["blocked"])}) for row in rows]


async def blocked_total(database: Database, selected: ViolationFilter) -> int:
    """The number of blocked checks.

    Raises:
        CatalogUnavailable: if the database does not answer.
    """
    query = select(func.coalesce(func.sum(selected.table.c.blocked), 0)).where(*_conditions(selected))
    async with database.reading() as connection:
        return int((await connection.execute(query)).scalar_one())


def _customer_of(subject: ColumnElement[str]) -> ColumnElement[Any]:
    by_customer = subject.like("c:%")
    return case((by_customer, func.substr(subject, 3)), else_=customers.c.name).label("customer")


def _conditions(selected: ViolationFilter) -> list[ColumnElement[bool]]:
    c = selected.table.c
    conditions: list[ColumnElement[bool]] = [c.minute_us >= selected.since_us, c.minute_us < selected.until_us]
    for column, value in ((c.tier, selected.tier), (c.rule, selected.rule), (c.subject, selected.subject)):
        if value is not None:
            conditions.append(column == value)
    if selected.attributes:
        # Values have no '=' and '&' of their own: those are escaped. Names have '_', which LIKE takes for any character.
        names = [name.replace("_", "!_") for name in selected.attributes]
        conditions.append(c.subject.like("a:" + "&".join(f"{name}=%" for name in names), escape="!"))
        conditions.append(c.subject.not_like("%" + "&%" * len(names)))
    return conditions
