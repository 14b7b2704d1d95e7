"""Writes batches to the database, each exactly once.

The row of `ledger_batches` with the last sequence of an instance is changed in the same transaction: a batch whose answer was
lost is repeated, and skipped if it was applied. An instance writes its batches one after another, in the order of their sequence.
Rows are written in the order of their keys, so that instances do not deadlock.
"""

from __future__ import annotations

from typing import Any, Final, cast

import msgspec
from sqlalchemy import Column, String, Table, text

from tidegate.catalog.sql.column_text import shorten
from tidegate.catalog.sql.database import Database
from tidegate.catalog.sql.partitions import AHEAD, is_moved_partition
from tidegate.catalog.sql.statements import load_statements
from tidegate.catalog.sql.tables import traffic_callers, traffic_latency, traffic_minutes, usage_ledger
from tidegate.ledger.buffer import Batch
from tidegate.timestamps import now_us

_SQL: Final = load_statements("tidegate.ledger", "storage.sql")
# As many attempts as partitions of a table may be attached meanwhile, and one more.
_ATTEMPTS: Final = 3 * (AHEAD + 1) + 1


async def write_batch(database: Database, instance: str, batch: Batch) -> bool:
    """Add the rows of a batch to the tables, in one transaction.

    Args:
        instance: id of the process, of at most 32 characters.
        batch: its next one, or the last one again. Texts too long for their column are shortened to distinct values.

    Returns:
        Whether it was applied now; False if an earlier attempt had applied it.

    Raises:
        CatalogUnavailable: if the database does not confirm it: repeat the same batch.
    """
    parts = [
        (f"{name}_{database.dialect}", {"parts": msgspec.json.encode(_fitted(table, rows)).decode()})
        for name, table, rows in (
            ("ledger", usage_ledger, batch.ledger),
            ("rules", traffic_minutes, batch.rules),
            ("callers", traffic_callers, batch.callers),
            ("latency", traffic_latency, batch.latency),
        )
        if rows
    ]
    claim = {"instance": instance, "sequence": batch.sequence, "at_us": now_us()}
    for attempts_left in reversed(range(_ATTEMPTS)):
        try:
            async with database.transaction() as connection:
                if (await connection.execute(text(_SQL["claim"]), claim)).first() is None:
                    return False
                for name, parameters in parts:
                    await connection.execute(text(_SQL[name]), parameters)
        except Exception as error:
            if not attempts_left or not is_moved_partition(error):
                raise
        else:
            return True
    raise AssertionError("the last attempt raises or returns")


def _fitted(table: Table, rows: Any) -> list[tuple[Any, ...]]:
    """Rows sorted by key, with texts that fit their columns."""
    columns = _key_columns(table)
    return sorted((*(_fit(value, column) for value, column in zip(key, columns, strict=True)), *counts) for key, counts in rows)


def _key_columns(table: Table) -> list[Column[Any]]:
    # Rows of latency have no step: those that are written are all of minutes.
    return [column for column in table.primary_key if column.name != "step_s"]


def _fit(value: Any, column: Column[Any]) -> Any:
    return shorten(value, cast("String", column.type).length or 0) if isinstance(value, str) else value
