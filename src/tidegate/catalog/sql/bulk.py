"""Many rows in few statements, so that the write lock is released as soon as possible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

from sqlalchemy import Table, bindparam, delete, insert, update
from sqlalchemy.ext.asyncio import AsyncConnection

BATCH_SIZE: Final = 500
"""Maximum number of rows per statement."""

_T = TypeVar("_T")


def batches(rows: Sequence[_T]) -> Iterator[list[_T]]:
    """Split rows into lists of at most `BATCH_SIZE`."""
    for begin in range(0, len(rows), BATCH_SIZE):
        yield list(rows[begin : begin + BATCH_SIZE])


async def insert_rows(connection: AsyncConnection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows."""
    for batch in batches(rows):
        await connection.execute(insert(table), batch)


async def update_rows(
    connection: AsyncConnection, table: Table, rows: Sequence[Mapping[Any, Any]], columns: Sequence[str]
) -> None:
    """Update columns of rows, found by `id`."""
    statement = update(table).where(table.c.id == bindparam("row_id")).values({column: bindparam(column) for column in columns})
    for batch in batches(rows):
        await connection.execute(statement, [{"row_id": row["id"], **{each: row[each] for each in columns}} for row in batch])


async def delete_rows(connection: AsyncConnection, table: Table, ids: Sequence[Any]) -> None:
    """Delete rows by id."""
    for batch in batches(ids):
        await connection.execute(delete(table).where(table.c.id.in_(batch)))
