"""Maintains the tables: minutes become hours, callers with few units are merged, old rows are deleted.

Any number of processes may do so concurrently: advisory locks let one at a time do it. Every step is one transaction, and
repeating it changes nothing.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import msgspec
from sqlalchemy import CursorResult, text

from tidegate import timestamps
from tidegate.catalog.sql.database import Database
from tidegate.catalog.sql.partitions import DAY_US, PartitionedTable, clock_us, run_steps
from tidegate.catalog.sql.statements import load_statements
from tidegate.ledger.buffer import HOUR_US

LEDGER: Final = PartitionedTable("usage_ledger", "day_us", 0x6C65_6467_6572_0001, "usage", monthly=True)
MINUTES: Final = PartitionedTable("traffic_minutes", "minute_us", 0x6C65_6467_6572_0002, "traffic by rule")
CALLERS: Final = PartitionedTable("traffic_callers", "hour_us", 0x6C65_6467_6572_0003, "traffic by caller")
"""The ids of their advisory locks are "ledger" in ASCII and a number."""
MERGE_AFTER_US: Final = 600_000_000
"""Callers of an hour are merged this long after its end, when most of it was written."""

_BATCHES_DAYS: Final = 30
"""How long the last sequence of a process is kept after it has written. No process repeats a batch for so long."""
_DELETE_BATCH_SIZE: Final = 5_000
_SQL: Final = load_statements("tidegate.ledger", "maintenance.sql")


class Retention(msgspec.Struct, frozen=True):
    """How long rows are kept.

    Args:
        keep_days: of the ledger, days.
        traffic_days: of the traffic history, days.
        minutes_days: how long traffic is kept by minute, days; before that by hour.
        max_callers: number of subjects, each in its rule, that are kept of an hour.
    """

    keep_days: int = 400
    traffic_days: int = 30
    minutes_days: int = 2
    max_callers: int = 1_000


async def maintain_tables(database: Database, retention: Retention, now_us: int | None = None) -> bool:
    """Create partitions, roll up minutes, merge callers and delete old rows.

    Args:
        now_us: µs since the epoch; None for the database's clock.

    Returns:
        Whether all was done; False if another process is doing a part of it.

    Raises:
        CatalogUnavailable: if a step failed; the others were done.
    """
    if now_us is None:
        now_us = await _now_us(database)
    rolled_before_us = now_us - now_us % HOUR_US - retention.minutes_days * DAY_US
    old_us = now_us - retention.traffic_days * DAY_US
    step = functools.partial
    return await run_steps(
        [
            step(_maintain, LEDGER, database, retention.keep_days, now_us),
            step(_roll_up, database, "rules", "minute", rolled_before_us),
            step(_roll_up, database, "latency", "latency", rolled_before_us),
            # A day later than they are rolled up: nothing is left in them.
            step(_maintain, MINUTES, database, retention.minutes_days + 1, now_us),
            step(_merge_callers, database, retention.max_callers, now_us),
            step(_maintain, CALLERS, database, retention.traffic_days, now_us),
            step(_delete_old, database, f"old_hours_{database.dialect}", old_us),
            step(_delete_old, database, f"old_latency_{database.dialect}", old_us),
            step(_delete_batches, database, now_us - _BATCHES_DAYS * DAY_US),
        ]
    )


async def _now_us(database: Database) -> int:
    if database.dialect == "sqlite":
        return timestamps.now_us()
    async with database.transaction() as connection:
        return await clock_us(connection)


async def _maintain(table: PartitionedTable, database: Database, keep_days: int, now_us: int) -> None:
    await table.maintain(database, keep_days, now_us)


async def _roll_up(database: Database, name: str, oldest: str, before_us: int) -> None:
    """Move the minutes before a time to their hours, one hour per transaction."""
    while True:
        async with MINUTES.exclusive(database) as connection:
            found = (await connection.execute(text(_SQL[f"oldest_{oldest}"]), {"before_us": before_us})).scalar()
            if found is None:
                return
            hour = {"from_us": found - found % HOUR_US, "to_us": found - found % HOUR_US + HOUR_US}
            await connection.execute(text(_SQL[f"{name}_{database.dialect}"]), hour)
            if database.dialect == "sqlite":
                await connection.execute(text(_SQL["delete_minutes" if name == "rules" else "delete_latency"]), hour)


async def _merge_callers(database: Database, max_callers: int, now_us: int) -> None:
    """Add the callers with the fewest units of the hours of the last day to the row of the others."""
    ended_us = now_us - MERGE_AFTER_US - HOUR_US
    hours = {"from_us": now_us - DAY_US, "to_us": ended_us, "max_callers": max_callers}
    async with CALLERS.exclusive(database) as connection:
        crowded = list((await connection.execute(text(_SQL["crowded_hours"]), hours)).scalars())
    for hour_us in crowded:
        selected = {"hour_us": hour_us, "max_callers": max_callers}
        async with CALLERS.exclusive(database) as connection:
            await connection.execute(text(_SQL[f"merge_callers_{database.dialect}"]), selected)
            if database.dialect == "sqlite":
                await connection.execute(text(_SQL["delete_callers"]), selected)


async def _delete_old(database: Database, statement: str, before_us: int) -> None:
    """In batches, so that writers can write in between."""
    deleted = _DELETE_BATCH_SIZE
    while deleted == _DELETE_BATCH_SIZE:
        async with MINUTES.exclusive(database) as connection:
            result: CursorResult[Any] = await connection.execute(
                text(_SQL[statement]), {"before_us": before_us, "max_rows": _DELETE_BATCH_SIZE}
            )
            deleted = result.rowcount


async def _delete_batches(database: Database, before_us: int) -> None:
    async with LEDGER.exclusive(database) as connection:
        await connection.execute(text(_SQL["old_batches"]), {"before_us": before_us})
