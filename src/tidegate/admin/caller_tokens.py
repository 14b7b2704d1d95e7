"""Tokens of the gateways and back ends that may call the data plane. Only their digests are stored."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import RowMapping, func, insert, select, update

from tidegate.admin.caller_token_models import CallerTokenMade, CallerTokenRead, CallerTokenRotated
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import AuditedTransaction, NotFound
from tidegate.catalog.caller_tokens import MAX_LIVE, SCOPES, hash_caller_token, make_caller_token
from tidegate.catalog.changes import CALLER_TOKEN
from tidegate.catalog.sql.catalog import live_caller_tokens
from tidegate.catalog.sql.paging import Page, invalid_cursor, page_of, rows_of
from tidegate.catalog.sql.tables import caller_tokens
from tidegate.errors import BadRequest, CatalogError
from tidegate.policy.labels import require_label
from tidegate.timestamps import US_PER_S, now_us

_KIND = "caller_token"


async def list_caller_tokens(editor: CatalogEditor, limit: int, after: str | None) -> Page[CallerTokenRead]:
    """Tokens of gateways and back ends by id, revoked ones too.

    Args:
        limit: maximum number of items, 1 to 500.
        after: `next` of the previous page.

    Raises:
        BadRequest: if `after` is not from this list.
        CatalogUnavailable: if the database does not answer.
    """
    query = select(caller_tokens).order_by(caller_tokens.c.id)
    if after is not None:
        query = query.where(caller_tokens.c.id > _id_after(after))
    rows = await rows_of(editor.catalog.database, query, limit)
    return page_of([CallerTokenRead.of_row(row) for row in rows], limit, lambda item: str(item.id))


async def create_caller_token(
    editor: CatalogEditor, actor: str, name: str, scopes: Collection[str], expires_at_us: int | None = None
) -> CallerTokenMade:
    """Make a token; the token itself is in this answer only.

    Args:
        name: of the caller: 1 to 200 characters, of no other token that works.
        scopes: what it permits, 1 or more of `SCOPES`.
        expires_at_us: µs since the epoch; None for a token that does not expire.

    Raises:
        BadRequest: if `expires_at` is in the past, or the name is not valid.
        CatalogError: if a token of that name works, or too many tokens work.
        CatalogUnavailable: if the database does not answer.
    """
    if expires_at_us is not None and expires_at_us <= now_us():
        raise BadRequest(
            "expires_at is in the past: send a later time, or leave it out for a token that does not expire", field="expires_at"
        )
    require_label(name, "name")
    if not name:
        raise BadRequest("name is empty: name the gateway or back end that will use the token", field="name")
    async with editor.changing(actor) as transaction:
        other = await transaction.one(
            select(caller_tokens.c.id).where(caller_tokens.c.name == name, *live_caller_tokens()).limit(1)
        )
        if other is not None:
            raise CatalogError(
                f"the caller token {other['id']} is named {name[:60]!r} already: rotate that one, or choose another name"
            )
        return await _insert(transaction, name, scopes, expires_at_us, "create")


async def rotate_caller_token(editor: CatalogEditor, actor: str, token_id: int, grace_s: int) -> CallerTokenRotated:
    """Replace a token by a new one with the same name, scopes and expiry.

    Args:
        token_id: id of the old token.
        grace_s: how long the old token still works, s; with 0 it is revoked now.

    Returns:
        The new token, which is in this answer only, and both records.

    Raises:
        NotFound: if there is no such token.
        CatalogError: if the old token is revoked or expired, or too many tokens work.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.changing(actor) as transaction:
        row = await _load_row(transaction, token_id)
        record = CallerTokenRead.of_row(row)
        if record.status != "active":
            raise CatalogError(f"the caller token {token_id} is {record.status}: create a new one instead")
        made = await _insert(transaction, row["name"], row["scopes"], row["expires_at_us"], "rotate")
        now = now_us()
        if grace_s:
            until = now + grace_s * US_PER_S
            values = {"expires_at_us": until if row["expires_at_us"] is None else min(until, row["expires_at_us"])}
        else:
            values = {"revoked_at_us": now}
        replaced = await _update(transaction, row, values, "rotate")
    return CallerTokenRotated(**dict(made), replaces=replaced)


async def revoke_caller_token(editor: CatalogEditor, actor: str, token_id: int) -> CallerTokenRead:
    """Revoke a token. Its record stays.

    Raises:
        NotFound: if there is no such token.
        CatalogError: if it is revoked already.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.changing(actor) as transaction:
        row = await _load_row(transaction, token_id)
        if row["revoked_at_us"] is not None:
            raise CatalogError(f"the caller token {token_id} is revoked already")
        return await _update(transaction, row, {"revoked_at_us": now_us()}, "revoke")


def _id_after(after: str) -> int:
    if not after.isascii() or not after.isdecimal() or len(after) > 18:
        raise invalid_cursor(after)
    return int(after)


async def _load_row(transaction: AuditedTransaction, token_id: int) -> RowMapping:
    row = await transaction.one(select(caller_tokens).where(caller_tokens.c.id == token_id))
    if row is None:
        raise NotFound(f"there is no caller token {token_id}: see GET /admin/v1/caller-tokens")
    return row


async def _insert(
    transaction: AuditedTransaction, name: str, scopes: Collection[str], expires_at_us: int | None, action: str
) -> CallerTokenMade:
    count = (
        await transaction.connection.execute(select(func.count()).select_from(caller_tokens).where(*live_caller_tokens()))
    ).scalar_one()
    if count >= MAX_LIVE:
        raise CatalogError(
            f"{count} caller tokens are active, and at most {MAX_LIVE} are possible: revoke those that are not used"
        )
    token = make_caller_token()
    values: dict[str, Any] = {
        "name": name,
        "sha256": hash_caller_token(token.encode()),
        "scopes": [scope for scope in SCOPES if scope in scopes],
        "created_at_us": now_us(),
        "expires_at_us": expires_at_us,
    }
    transaction.touch(CALLER_TOKEN, values["sha256"])
    token_id = (
        await transaction.connection.execute(insert(caller_tokens).values(values).returning(caller_tokens.c.id))
    ).scalar_one()
    made = CallerTokenRead.of_row({**values, "id": token_id, "revoked_at_us": None})
    await transaction.audit(action, _KIND, str(token_id), None, made)
    return CallerTokenMade(**dict(made), token=token)


async def _update(transaction: AuditedTransaction, row: RowMapping, values: dict[str, Any], action: str) -> CallerTokenRead:
    transaction.touch(CALLER_TOKEN, row["sha256"])
    await transaction.connection.execute(update(caller_tokens).where(caller_tokens.c.id == row["id"]).values(values))
    before, after = CallerTokenRead.of_row(row), CallerTokenRead.of_row({**row, **values})
    await transaction.audit(action, _KIND, str(row["id"]), before, after)
    return after
