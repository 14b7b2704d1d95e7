"""The rows of what-if runs: any instance reads and cancels a run, the one that works on it writes its progress."""

from __future__ import annotations

import re
import secrets
from typing import Any, Final

from pydantic import JsonValue
from sqlalchemy import delete, insert, select, update

from tidegate.admin.models.base import ResponseModel, Row
from tidegate.admin.transaction import NotFound
from tidegate.catalog.sql.database import Database
from tidegate.catalog.sql.tables import what_if_runs
from tidegate.timestamps import US_PER_S, format_timestamp, now_us

RUNNING: Final = "running"
DONE: Final = "done"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"
MAX_RUNS: Final = 50
"""Maximum number of runs kept; beyond it the oldest one is deleted."""
SILENT_S: Final = 60
"""How long a run may write no progress, s: then the instance that worked on it has ended."""

_KEPT_S: Final = 86_400
_ID: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)


class WhatIfRead(ResponseModel):
    """A run: `state` is running, done, failed or cancelled; `result` is null unless it is done."""

    id: str
    state: str
    progress: float
    created_at: str
    message: str | None
    result: dict[str, JsonValue] | None

    @classmethod
    def of_row(cls, row: Row) -> WhatIfRead:
        """Of a row of `what_if_runs`."""
        state, stored = row["state"], row["result"] or {}
        message = stored.get("message")
        if state == RUNNING and row["changed_at_us"] < now_us() - SILENT_S * US_PER_S:
            state, message = FAILED, "the instance that worked on it has ended: start it again"
        return cls(
            id=row["id"],
            state=state,
            progress=row["progress"],
            created_at=format_timestamp(row["created_at_us"]),
            message=message,
            result=stored if state == DONE else None,
        )


async def start_run(database: Database, actor: str) -> str:
    """Make the row of a new run, and delete old ones.

    Returns:
        Its id.

    Raises:
        CatalogUnavailable: if the database rejects it.
    """
    run_id, now, c = secrets.token_hex(16), now_us(), what_if_runs.c
    surplus = select(c.id).order_by(c.created_at_us.desc(), c.id).offset(MAX_RUNS - 1)
    values = {"id": run_id, "actor": actor, "state": RUNNING, "progress": 0.0, "created_at_us": now, "changed_at_us": now}
    async with database.transaction() as connection:
        await connection.execute(delete(what_if_runs).where(c.created_at_us < now - _KEPT_S * US_PER_S))
        oldest = (await connection.execute(surplus)).scalars().all()
        if oldest:
            await connection.execute(delete(what_if_runs).where(c.id.in_(oldest)))
        await connection.execute(insert(what_if_runs).values(values))
    return run_id


async def read_run(database: Database, run_id: str) -> WhatIfRead:
    """Read a run.

    Raises:
        NotFound: if there is none with this id.
        CatalogUnavailable: if the database does not answer.
    """
    row = None
    if _ID.fullmatch(run_id) is not None:
        async with database.reading() as connection:
            query = select(what_if_runs).where(what_if_runs.c.id == run_id)
            row = (await connection.execute(query)).mappings().first()
    if row is None:
        raise NotFound("there is no such run: runs are kept for a day, and at most 50 of them")
    return WhatIfRead.of_row(row)


async def note_progress(database: Database, run_id: str, progress: float) -> bool:
    """Write the progress of a run, 0 to 1.

    Returns:
        Whether it is to go on; False if it was cancelled or deleted.

    Raises:
        CatalogUnavailable: if the database rejects it.
    """
    return await _change(database, run_id, {"progress": progress})


async def end_run(database: Database, run_id: str, state: str, result: dict[str, Any] | None = None) -> bool:
    """End a run that is running.

    Returns:
        Whether it was running.

    Raises:
        CatalogUnavailable: if the database rejects it.
    """
    progress = {"progress": 1.0} if state == DONE else {}
    return await _change(database, run_id, {"state": state, "result": result, **progress})


async def _change(database: Database, run_id: str, values: dict[str, Any]) -> bool:
    c = what_if_runs.c
    statement = update(what_if_runs).where(c.id == run_id, c.state == RUNNING).values(changed_at_us=now_us(), **values)
    async with database.transaction() as connection:
        return (await connection.execute(statement)).rowcount > 0
