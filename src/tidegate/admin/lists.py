"""What operators read of the catalog, page by page. A page begins behind the last row of the one before, never at a number: rows
that come and go meanwhile neither repeat nor hide others. `reading_violations` does the same for violations.
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
from tidegate.catalog.sql.paging import Page, no_place, page_of, rows_of
from tidegate.catalog.sql.tables import admin_tokens, api_keys, audit_log, rate_limit_rules, tiers
from tidegate.policy.model import KeyStatus
from tidegate.timestamps import now_us

STRIDE: Final = 20_000
"""A search for a part of a text looks at so many rows at once."""


async def list_tiers(editor: CatalogEditor, limit: int, after: str | None, name: str | None = None) -> Page[TierRead]:
    """Tiers by name.

    Args:
        editor: of the catalog.
        limit: at most so many, 1 to 500.
        after: `next` of the page before.
        name: only those with this in their name, in any case.

    Returns:
        The page.

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
        editor: of the catalog.
        limit: at most so many, 1 to 500.
        after: `next` of the page before.
        tier: only those of this tier.
        endpoint: only those with this in their endpoint, in any case.
        name: only those with this in their name, in any case.

    Returns:
        The page.

    Raises:
        BadRequest: if `after` is none of this list.
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
) -> Page[KeyRead]:
    """API keys by id.

    Args:
        editor: of the catalog.
        limit: at most so many, 1 to 500.
        after: `next` of the page before.
        tier: only those of this tier.
        status: only those that are active, expired or revoked.
        name: only those with this in their name, in any case.
        id_prefix: only those whose ids begin with this, of hex digits in lower case.

    Returns:
        The page.

    Raises:
        CatalogUnavailable: if the database does not answer.
    """
    query = key_rows().order_by(api_keys.c.id)
    if tier is not None:
        query = query.where(api_keys.c.tier_id == await _id_of_tier(editor, tier))
    if status == KeyStatus.REVOKED.value:
        query = query.where(api_keys.c.status == literal_column(f"'{KeyStatus.REVOKED.value}'"))
    elif status is not None:
        over = and_(api_keys.c.expires_at_us.is_not(None), api_keys.c.expires_at_us <= now_us())
        active = api_keys.c.status == literal_column(f"'{KeyStatus.ACTIVE.value}'")
        query = query.where(active, over if status == "expired" else ~over)
    if id_prefix is not None:
        # 'g' sorts behind every hex digit: a range that the primary key's index answers, on any database.
        query = query.where(api_keys.c.id >= id_prefix, api_keys.c.id < id_prefix + "g")
    if after is not None:
        query = query.where(api_keys.c.id > after)
    rows = await _rows_with(editor, query, limit, api_keys.c.id, {"name": name})
    return page_of([KeyRead.of_row(row) for row in rows], limit, lambda item: str(item.id))


async def list_tokens(editor: CatalogEditor, limit: int, after: str | None) -> Page[TokenRead]:
    """Tokens by id, revoked ones too.

    Args:
        editor: of the catalog.
        limit: at most so many, 1 to 500.
        after: `next` of the page before.

    Returns:
        The page.

    Raises:
        BadRequest: if `after` is none of this list.
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
    """The audit log, the newest first.

    Args:
        editor: of the catalog.
        limit: at most so many, 1 to 500.
        after: `next` of the page before.
        kind: only this kind of target.
        target: only this target.
        actor: only this actor.

    Returns:
        The page.

    Raises:
        BadRequest: if `after` is none of this list.
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

    Args:
        editor: of the catalog.
        name: of the tier.

    Returns:
        Its form.

    Raises:
        NotFound: if there is none.
        CatalogUnavailable: if the database does not answer.
    """
    rows = await rows_of(editor.catalog.database, select(tiers).where(tiers.c.name == name), 1)
    if not rows:
        raise NotFound(f"there is no tier {name[:64]!r}: see GET /admin/v1/tiers")
    return TierRead.of_row(rows[0])


async def get_rule(editor: CatalogEditor, rule_id: int) -> RuleRead:
    """One rule.

    Args:
        editor: of the catalog.
        rule_id: its id.

    Returns:
        Its form.

    Raises:
        NotFound: if there is none.
        CatalogUnavailable: if the database does not answer.
    """
    rows = await rows_of(editor.catalog.database, rule_rows().where(rate_limit_rules.c.id == rule_id), 1)
    if not rows:
        raise NotFound(f"there is no rule {rule_id}: see GET /admin/v1/rate-limit-rules")
    return RuleRead.of_row(rows[0])


async def key_row(editor: CatalogEditor, key_id: str) -> Any:
    """The row of an API key.

    Args:
        editor: of the catalog.
        key_id: its id.

    Returns:
        The row, with its tier's name as `tier_name`.

    Raises:
        NotFound: if there is none.
        CatalogUnavailable: if the database does not answer.
    """
    rows = await rows_of(editor.catalog.database, key_rows().where(api_keys.c.id == key_id), 1) if is_key_id(key_id) else []
    if not rows:
        raise no_such_key(key_id)
    return rows[0]


async def _rows_with(
    editor: CatalogEditor, query: Select[Any], limit: int, place: Column[Any], parts: Mapping[str, str | None]
) -> list[Any]:
    """As `rows_of`, of the rows that have certain texts in certain columns, in any case.

    No index finds a part of a text. So the rows are walked in order, `STRIDE` by `STRIDE`, until the page is full: no statement
    takes long, however many rows there are and however few of them have the text.
    """
    wanted = {column: part for column, part in parts.items() if part is not None}
    if not wanted:
        return await rows_of(editor.catalog.database, query, limit)
    found: list[Any] = []
    begin: Any = None
    async with editor.reading() as connection:
        while True:
            rest = query if begin is None else query.where(place > begin)
            condition = true() if rest.whereclause is None else rest.whereclause
            # Where the stride ends is asked first: so that it is no more than a part of the index, whatever PostgreSQL expects.
            last = select(place).where(condition).order_by(place).offset(STRIDE - 1).limit(1)
            end = (await connection.execute(last)).scalar()
            stride = (rest if end is None else rest.where(place <= end)).limit(STRIDE).subquery()
            having = [_contains(editor, stride.c[column], part) for column, part in wanted.items()]
            held = select(stride).where(*having).order_by(stride.c[place.name]).limit(limit + 1 - len(found))
            found += (await connection.execute(held)).mappings().all()
            if end is None or len(found) > limit:
                return found
            begin = end


def _contains(editor: CatalogEditor, column: ColumnElement[str], part: str) -> ColumnElement[bool]:
    """Whether a column has a text in it, in any case."""
    if part.isascii() or editor.catalog.database.dialect != "sqlite":
        return column.icontains(part, autoescape=True)
    return func.instr(getattr(func, LOWER)(column), part.lower()) > 0


async def _id_of_tier(editor: CatalogEditor, name: str) -> ColumnElement[int]:
    """The id of a tier, 0 where there is none, as a part of the statement.

    Not the name in the join, nor a parameter: PostgreSQL knows how many rows a tier has only where the statement says which tier.
    Otherwise it takes the largest one for one of the usual size, and reads and sorts all its rows for each page.
    """
    async with editor.reading() as connection:
        found = (await connection.execute(select(tiers.c.id).where(tiers.c.name == name))).scalar()
    return literal_column(str(int(found or 0)))


def _number(after: str) -> int:
    if not after.isascii() or not after.isdecimal() or len(after) > 18:
        raise no_place(after)
    return int(after)
