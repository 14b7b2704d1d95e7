"""Notifications for operators: what was delivered, what waits, and what failed."""

from __future__ import annotations

from typing import Final

from sqlalchemy import select, tuple_, update

from tidegate.admin.notification_models import NotificationRead
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import NotFound
from tidegate.catalog.changes import NONE
from tidegate.catalog.sql.paging import Page, cursor_of, parse_cursor, rows_of
from tidegate.catalog.sql.tables import notifications
from tidegate.errors import CatalogError
from tidegate.notifications.events import DELIVERED, PENDING
from tidegate.timestamps import US_PER_S, now_us

RETRY_FOR_S: Final = 86_400
"""How long delivery is attempted after an operator has asked for it."""

_c = notifications.c


async def list_notifications(
    editor: CatalogEditor, limit: int, after: str | None, status: str | None = None
) -> Page[NotificationRead]:
    """Notifications, the newest first.

    Args:
        limit: maximum number of items, 1 to 500.
        after: `next` of the previous page.
        status: pending, delivered or failed; None for all.

    Raises:
        BadRequest: if `after` is not from this list.
        CatalogUnavailable: if the database does not answer.
    """
    query = select(notifications).order_by(_c.created_at_us.desc(), _c.id.desc())
    if status is not None:
        query = query.where(_c.status == status)
    if after is not None:
        position = parse_cursor(after, tuple[int, str])
        query = query.where(tuple_(_c.created_at_us, _c.id) < tuple_(*position))
    rows = await rows_of(editor.catalog.database, query, limit)
    last = rows[limit - 1] if len(rows) > limit else None
    items = [NotificationRead.of_row(row) for row in rows[:limit]]
    return Page(items, None if last is None else cursor_of((last["created_at_us"], last["id"])))


async def retry_notification(editor: CatalogEditor, actor: str, notification_id: str) -> NotificationRead:
    """Deliver a notification as soon as possible, also if it has failed.

    Raises:
        NotFound: if there is none with this id.
        CatalogError: if it was delivered already.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.changing(actor) as transaction:
        row = await transaction.one(select(notifications).where(_c.id == notification_id))
        if row is None:
            raise NotFound(f"there is no notification {notification_id[:40]!r}: see GET /admin/v1/notifications")
        if row["status"] == DELIVERED:
            raise CatalogError(f"the notification {notification_id[:40]} is delivered already: receivers would ignore its id")
        transaction.touch(NONE)
        now = now_us()
        values = {"status": PENDING, "next_at_us": now, "give_up_at_us": now + RETRY_FOR_S * US_PER_S}
        await transaction.connection.execute(update(notifications).where(_c.id == notification_id).values(values))
        states = ({"status": row["status"]}, {"status": PENDING})
        await transaction.audit("retry", "notification", notification_id, *states)
    return NotificationRead.of_row({**row, **values})
