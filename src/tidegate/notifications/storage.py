"""The queue of notifications in the database.

Any process inserts rows and claims them. A claim moves `next_at_us` of a row to its end, in one statement that skips rows locked
by others: a process that dies loses its claim then, and another one repeats the delivery with the same id.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from tidegate.catalog.sql.database import Database
from tidegate.catalog.sql.tables import notifications
from tidegate.notifications.delivery import Attempt
from tidegate.notifications.events import DELIVERED, FAILED, PENDING

MAX_ROWS: Final = 500
"""Most rows of one transaction."""
_PURGE_ROWS: Final = 1_000

_c = notifications.c


async def add_rows(database: Database, rows: Sequence[Mapping[str, Any]], max_pending: int) -> int:
    """Add rows to the queue; those that are there already stay as they are.

    Args:
        rows: see `Event.rows`; at most `MAX_ROWS`.
        max_pending: most rows that wait for delivery.

    Returns:
        How many were dropped because the queue is full.

    Raises:
        CatalogUnavailable: if the database rejects them: add them again.
    """
    waiting = select(_c.id).where(_c.status == PENDING).limit(max_pending).subquery()
    async with database.transaction() as connection:
        room = max_pending - (await connection.execute(select(func.count()).select_from(waiting))).scalar_one()
        # Sorted, so that processes that add the same rows do not deadlock.
        taken = sorted(rows, key=lambda row: str(row["id"]))[: max(room, 0)]
        if taken:
            insert = postgresql.insert if database.dialect == "postgresql" else sqlite.insert
            await connection.execute(insert(notifications).on_conflict_do_nothing(index_elements=["id"]), list(taken))
    return len(rows) - len(taken)


async def claim(
    database: Database, now_us: int, until_us: int, limit: int, paused: Collection[str] = ()
) -> Sequence[Mapping[str, Any]]:
    """Claim rows that are due, the ones that wait longest first.

    Args:
        now_us: µs since the epoch.
        until_us: end of the claim.
        limit: most rows.
        paused: URLs that are not called now.

    Returns:
        The rows, with this attempt counted.

    Raises:
        CatalogUnavailable: if the database does not answer.
    """
    due = select(_c.id).where(_c.status == PENDING, _c.next_at_us <= now_us)
    if paused:
        due = due.where(_c.url.not_in(paused))
    # A read first: it takes no lock, and mostly nothing is due.
    async with database.reading() as connection:
        if (await connection.execute(due.limit(1))).first() is None:
            return ()
    chosen = due.order_by(_c.next_at_us).limit(limit).with_for_update(skip_locked=True)
    claimed = (
        update(notifications)
        .where(_c.id.in_(chosen))
        .values(next_at_us=until_us, attempts=_c.attempts + 1)
        .returning(notifications)
    )
    async with database.transaction() as connection:
        return list((await connection.execute(claimed)).mappings().all())


async def finish(database: Database, row: Mapping[str, Any], attempt: Attempt, at_us: int, next_at_us: int | None) -> None:
    """Store the result of an attempt.

    Args:
        row: as claimed; not changed if another process claimed it since.
        attempt: its result.
        at_us: when it ended.
        next_at_us: when the next attempt is due; None for none: then it has failed, unless it was delivered.

    Raises:
        CatalogUnavailable: if the database does not answer: the attempt is repeated when the claim ends.
    """
    status = DELIVERED if attempt.delivered else FAILED if next_at_us is None else PENDING
    values: dict[str, Any] = {
        "status": status,
        "attempted_at_us": at_us,
        "answer": attempt.answer,
        "error": attempt.error or None,
    }
    if next_at_us is not None:
        values["next_at_us"] = next_at_us
    own = (_c.id == row["id"], _c.attempts == row["attempts"], _c.status == PENDING)
    async with database.transaction() as connection:
        await connection.execute(update(notifications).where(*own).values(values))


async def delete_old(database: Database, before_us: int) -> None:
    """Delete rows that were created before a moment and do not wait for delivery, some at a time.

    Raises:
        CatalogUnavailable: if the database does not answer.
    """
    old = select(_c.id).where(_c.created_at_us < before_us, _c.status != PENDING).limit(_PURGE_ROWS)
    async with database.reading() as connection:
        found = list((await connection.execute(old)).scalars().all())
    if found:
        async with database.transaction() as connection:
            await connection.execute(delete(notifications).where(_c.id.in_(found)))
