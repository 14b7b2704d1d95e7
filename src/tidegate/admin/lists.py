"""Lists for operators, in pages of 1 to 500 items (`limit`); `after` is the `next` of the previous page. See
`catalog.sql.paging`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Column, ColumnElement, Select, and_, func, literal_column, select, true

from tidegate.admin.api_keys import key_rows, no_such_key
from tidegate.admin.models import AuditRead, KeyRead, RuleRead, TierRead, TokenRead, is_key_id
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import NotFound, rule_rows
from tidegate.catalog.sql.engine import LOWER
from tidegate.catalog.sql.paging import Page, invalid_cursor, page_of, rows_of
from tidegate.catalog.sql.tables import admin_tokens, api_keys, audit_log, customers, rate_limit_rules, tiers
from tidegate.policy.model import KeyStatus
from tidegate.timestamps import now_us

STRIDE: Final = 20_000
"""Number of rows that one statement of a substring search reads."""


async def list_tiers(editor: CatalogEditor, limit: int, after: str | None, name: str | None = None) -> Page[TierRead]:
    """Tiers by name.

    Args:
        name: substring of the name, case-insensitive.

    Raises:
        CatalogUnavailable: if the database does not answer.
    """
    query = select(tiers).order_by(tiers.c.name)
    if after is not None:
        query = query.where(tiers.c.name > after)
    rows = await _rows_with(editor, query, limit, tiers.c.name, {"name": name})
    return page_of([TierRead.of_row(row) for row in rows], limit, lambda item: str(item.name))


async def list_rules(
    editor: CatalogEditor,
    limit: int,
    after: str | None,
    tier: str | None = None,
    endpoint: str | None = None,
    name: str | None = None,
) -> Page[RuleRead]:
    """Rules by id.

    Args:
        endpoint: substring of the endpoint, case-insensitive.
        name: substring of the name, case-insensitive.

    Raises:
        BadRequest: if `after` is not valid.
        CatalogUnavailable: if the database does not answer.
    """
    query = rule_rows().order_by(rate_limit_rules.c.id)
    if tier is not None:
        query = query.where(rate_limit_rules.c.tier_id == await _id_of_tier(editor, tier))
    if after is not None:
        query = query.where(rate_limit_rules.c.id > _number(after))
    rows = await _rows_with(editor, query, limit, rate_limit_rules.c.id, {"endpoint_pattern": endpoint, "name": name})
    return page_of([RuleRead.of_row(row) for row in rows], limit, lambda item: str(item.id))


async def list_keys(
    editor: CatalogEditor,
    limit: int,
    after: str | None,
    tier: str | None = None,
    status: str | None = None,
    name: str | None = None,
    id_prefix: str | None = None,
    customer: str | None = None,
) -> Page[KeyRead]:
    """API keys by id.

    Args:
        name: substring of the name, case-insensitive.
        id_prefix: prefix of the id, lower-case hex digits.

    Raises:
        CatalogUnavailable: if the database does not answer.
    """
    query = key_rows().order_by(api_keys.c.id)
    if tier is not None:
        query = query.where(api_keys.c.tier_id == await _id_of_tier(editor, tier))
    if customer is not None:
        query = query.where(api_keys.c.customer_id == await _id_of_customer(editor, customer))
    if status == KeyStatus.REVOKED.value:
        query = query.where(api_keys.c.status == literal_column(f"'{KeyStatus.REVOKED.value}'"))
    elif status is not None:
        over = and_(api_keys.c.expires_at_us.is_not(None), api_keys.c.expires_at_us <= now_us())
        active = api_keys.c.status == literal_column(f"'{KeyStatus.ACTIVE.value}'")
        query = query.where(active, over if status == "expired" else ~over)
    if id_prefix is not None:
        # 'g' sorts after every hex digit: a range scan of the primary key's index on any database.
        query = query.where(api_keys.c.id >= id_prefix, api_keys.c.id < id_prefix + "g")
    if after is not None:
        query = query.where(api_keys.c.id > after)
    rows = await _rows_with(editor, query, limit, api_keys.c.id, {"name": name})
    return page_of([KeyRead.of_row(row) for row in rows], limit, lambda item: str(item.id))


async def list_tokens(editor: CatalogEditor, limit: int, after: str | None) -> Page[TokenRead]:
    """Tokens by id, including revoked ones.

    Raises:
        BadRequest: if `after` is not valid.
        CatalogUnavailable: if the database does not answer.
    """
    query = select(admin_tokens).order_by(admin_tokens.c.id)
    if after is not None:
        query = query.where(admin_tokens.c.id > _number(after))
    rows = await rows_of(editor.catalog.database, query, limit)
    return page_of([TokenRead.of_row(row) for row in rows], limit, lambda item: str(item.id))


async def list_audit(
    editor: CatalogEditor,
    limit: int,
    after: str | None,
    kind: str | None = None,
    target: str | None = None,
    actor: str | None = None,
) -> Page[AuditRead]:
    """The audit log, newest first.

    Raises:
        BadRequest: if `after` is not valid.
        CatalogUnavailable: if the database does not answer.
    """
    query = select(audit_log).order_by(audit_log.c.id.desc())
    for column, value in ((audit_log.c.kind, kind), (audit_log.c.target, target), (audit_log.c.actor, actor)):
        if value is not None:
            query = query.where(column == value)
    if after is not None:
        query = query.where(audit_log.c.id < _number(after))
    rows = await rows_of(editor.catalog.database, query, limit)
    return page_of([AuditRead.of_row(row) for row in rows], limit, lambda item: str(item.id))


async def get_tier(editor: CatalogEditor, name: str) -> TierRead:
    """One tier.

    Raises:
        NotFound: if it does not exist.
        CatalogUnavailable: if the database does not answer.
    """
    rows = await rows_of(editor.catalog.database, select(tiers).where(tiers.c.name == name), 1)
    if not rows:
        raise NotFound(f"there is no tier {name[:64]!r}: see GET /admin/v1/tiers")
    return TierRead.of_row(rows[0])


async def get_rule(editor: CatalogEditor, rule_id: int) -> RuleRead:
    """One rule.

    Raises:
        NotFound: if it does not exist.
        CatalogUnavailable: if the database does not answer.
    """
    rows = await rows_of(editor.catalog.database, rule_rows().where(rate_limit_rules.c.id == rule_id), 1)
    if not rows:
        raise NotFound(f"there is no rule {rule_id}: see GET /admin/v1/rate-limit-rules")
    return RuleRead.of_row(rows[0])


async def key_row(editor: CatalogEditor, key_id: str) -> Any:
    """The row of an API key.

    Raises:
        NotFound: if it does not exist.
        CatalogUnavailable: if the database does not answer.
    """
    rows = await rows_of(editor.catalog.database, key_rows().where(api_keys.c.id == key_id), 1) if is_key_id(key_id) else []
    if not rows:
        raise no_such_key(key_id)
    return rows[0]


async def _rows_with(
    editor: CatalogEditor, query: Select[Any], limit: int, order: Column[Any], filters: Mapping[str, str | None]
) -> list[Any]:
    """Like `rows_of`, with case-insensitive substring filters by column.

    No index supports substrings. So the rows are scanned in order, `STRIDE` at a time, until the page is full: no statement runs
    long, however many rows there are and however few of them match.
    """
    substrings = {column: part for column, part in filters.items() if part is not None}
    if not substrings:
        return await rows_of(editor.catalog.database, query, limit)
    found: list[Any] = []
    begin: Any = None
    async with editor.reading() as connection:
        while True:
            rest = query if begin is None else query.where(order > begin)
            condition = true() if rest.whereclause is None else rest.whereclause
            # The end of the stride is queried first, so that PostgreSQL scans no more than this part of the index, whatever it
            # estimates.
            last = select(order).where(condition).order_by(order).offset(STRIDE - 1).limit(1)
            end = (await connection.execute(last)).scalar()
            bounded = select(order.table).where(condition, true() if end is None else order <= end)
            stride = bounded.order_by(order).limit(STRIDE).subquery()
            having = [_contains(editor, stride.c[column], part) for column, part in substrings.items()]
            place = stride.c[order.name]
            matching = select(place).where(*having).order_by(place).limit(limit + 1 - len(found))
            # Names of tiers and customers are read for what matches: joined to the stride, PostgreSQL may read all of them.
            if places := (await connection.execute(matching)).scalars().all():
                rows = query.where(order.in_(places)).order_by(None).order_by(order)
                found += (await connection.execute(rows)).mappings().all()
            if end is None or len(found) > limit:
                return found
            begin = end


def _contains(editor: CatalogEditor, column: ColumnElement[str], part: str) -> ColumnElement[bool]:
    """Whether a column contains a substring, case-insensitive."""
    if part.isascii() or editor.catalog.database.dialect != "sqlite":
        return column.icontains(part, autoescape=True)
    return func.instr(getattr(func, LOWER)(column), part.lower()) > 0


async def _id_of_tier(editor: CatalogEditor, name: str) -> ColumnElement[int]:
    """The id of a tier as a literal of the statement; 0 if it does not exist.

    Not a join by name, nor a parameter: PostgreSQL estimates the rows of a tier only from a literal. Otherwise it assumes an
    average tier, and reads and sorts all rows of a large one for each page.
    """
    async with editor.reading() as connection:
        found = (await connection.execute(select(tiers.c.id).where(tiers.c.name == name))).scalar()
    return literal_column(str(int(found or 0)))


async def _id_of_customer(editor: CatalogEditor, name: str) -> int:
    """The id of a customer; 0 if it does not exist."""
    async with editor.reading() as connection:
        return int((await connection.execute(select(customers.c.id).where(customers.c.name == name))).scalar() or 0)


def _number(after: str) -> int:
    if not after.isascii() or not after.isdecimal() or len(after) > 18:
        raise invalid_cursor(after)
    return int(after)
