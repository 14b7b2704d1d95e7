"""Reads the usage ledger in pages, as CSV or JSON lines. A page takes constant memory, whatever the ledger has."""

from __future__ import annotations

import csv
import datetime
import io
import re
from collections.abc import Iterable
from typing import Final, Literal, TypeAlias

import msgspec
from sqlalchemy import ColumnElement, select, tuple_

from tidegate.catalog.sql.database import Database
from tidegate.catalog.sql.paging import Page, cursor_of, parse_cursor
from tidegate.catalog.sql.tables import usage_ledger
from tidegate.errors import BadRequest
from tidegate.ledger.buffer import DAY_US
from tidegate.time_slice import TimeSlice
from tidegate.timestamps import now_us, to_us

MAX_ROWS: Final = 10_000
"""Maximum number of rows of a page, about 1 MB."""
COLUMNS: Final = ("day", "customer", "api_key_id", "tier", "rule", "admitted", "blocked", "over")

Format: TypeAlias = Literal["csv", "jsonl"]

_READ_SIZE: Final = 1_000
"""Rows of one query: reading them takes the event loop about 3 ms."""
_DAY: Final = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)


class LedgerFilter(msgspec.Struct, frozen=True):
    """Selects rows; None selects all.

    Args:
        from_us: first day, µs since the epoch.
        to_us: the day after the last one.
        customer: name; empty for the units of no customer.
        key_id: id of an API key; empty for those of callers without one.
    """

    from_us: int
    to_us: int
    customer: str | None = None
    key_id: str | None = None


class LedgerRow(msgspec.Struct, frozen=True):
    """Units of a day, customer, API key and rule.

    Args:
        day: in UTC, such as `2026-11-30`.
        customer: name; empty for none.
        api_key_id: empty for callers without an API key.
        rule: empty for units that no rule of the tier answered.
        admitted: units of checks that passed.
        over: of these, units above a quota or a soft limit.
    """

    day: str
    customer: str
    api_key_id: str
    tier: str
    rule: str
    admitted: int
    blocked: int
    over: int


async def read_ledger(
    database: Database, selected: LedgerFilter, after: str | None = None, limit: int = MAX_ROWS
) -> Page[LedgerRow]:
    """A page of rows, by day, customer, API key, tier and rule. Units may be added to the current day between two pages.

    Args:
        after: `next` of the previous page; None for the first one.
        limit: 1 to `MAX_ROWS`.

    Raises:
        BadRequest: if `after` is not valid.
        CatalogUnavailable: if the database does not answer.
    """
    c = usage_ledger.c
    key = (c.day_us, c.customer, c.key_id, c.tier, c.rule)
    conditions: list[ColumnElement[bool]] = [c.day_us < selected.to_us]
    if selected.customer is not None:
        conditions.append(c.customer == selected.customer)
    if selected.key_id is not None:
        conditions.append(c.key_id == selected.key_id)
    query = select(*key, c.admitted, c.blocked, c.over_limit).where(*conditions).order_by(*key)
    position = None if after is None else parse_cursor(after, tuple[int, str, str, str, str])
    items: list[LedgerRow] = []
    slice_ = TimeSlice()
    while True:
        wanted = min(limit + 1 - len(items), _READ_SIZE)
        first_us = selected.from_us if position is None else max(position[0], selected.from_us)
        # With the day by itself an index supports the condition.
        page = query.where(c.day_us >= first_us).limit(wanted)
        if position is not None:
            page = page.where(tuple_(*key) > tuple_(*position))
        async with database.reading() as connection:
            rows = (await connection.execute(page)).all()
        for row in rows:
            if len(items) == limit:
                assert position is not None
                return Page(items, cursor_of(position))
            day_us, *texts = row[:5]
            items.append(LedgerRow(_day(day_us), *texts, *map(int, row[5:])))
            position = (day_us, *texts)
        if len(rows) < wanted:
            return Page(items, None)
        if slice_.over:
            await slice_.pause()


def render(rows: Iterable[LedgerRow], form: Format, *, header: bool) -> str:
    """Rows as text.

    Args:
        header: whether CSV begins with the names of the columns.

    Returns:
        Lines that end with a line feed.
    """
    if form == "jsonl":
        return msgspec.json.Encoder().encode_lines(list(rows)).decode()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(COLUMNS)
    writer.writerows(msgspec.structs.astuple(row) for row in rows)
    return text.getvalue()


def read_days(from_: str | None, to: str | None) -> tuple[int, int]:
    """The range of an export.

    Args:
        from_: first day; None for the first of the current month.
        to: the day after the last one; None for tomorrow, so that today is included.

    Returns:
        Its begin and end, µs since the epoch.

    Raises:
        BadRequest: if a day is not valid, or the range is empty.
    """
    today_us = now_us() - now_us() % DAY_US
    to_us_ = today_us + DAY_US if to is None else _parse_day(to, "to")
    from_us = _month_of(to_us_ - DAY_US) if from_ is None else _parse_day(from_, "from")
    if from_us >= to_us_:
        raise BadRequest("from is not before to: the last day is the one before to; swap the two, or raise to", field="from")
    return from_us, to_us_


def _parse_day(text: str, field: str) -> int:
    try:
        if not _DAY.fullmatch(text):
            raise ValueError("another format")
        return to_us(datetime.datetime.fromisoformat(f"{text}T00:00:00+00:00"))
    except ValueError:
        raise BadRequest(f"{field} {text[:40]!r} is not a valid day; write it as 2026-11-30 (UTC)", field=field) from None


def _month_of(at_us: int) -> int:
    day = datetime.datetime.fromtimestamp(at_us // 1_000_000, datetime.UTC)
    return to_us(day.replace(day=1, hour=0, minute=0, second=0, microsecond=0))


def _day(day_us: int) -> str:
    return (datetime.date(1970, 1, 1) + datetime.timedelta(days=day_us // DAY_US)).isoformat()
