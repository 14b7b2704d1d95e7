"""Tables of which old rows expire: on PostgreSQL with one partition per day or month (UTC), which is dropped when it expires.

Rows without a partition of their period are in the default one. On SQLite old rows are deleted. Any number of processes may
maintain a table concurrently: an advisory lock lets one at a time do it.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Final

import msgspec
from sqlalchemy import CursorResult, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from tidegate import timestamps
from tidegate.catalog.sql.database import Database
from tidegate.catalog.sql.statements import load_statements
from tidegate.errors import CatalogUnavailable

logger = logging.getLogger(__name__)

AHEAD: Final = 3
"""Partitions are created for the current period and this many after it."""
DAY_US: Final = 86_400_000_000

_MAX_MOVED: Final = 100_000
"""Moving this many rows takes about a second, during which they are locked."""
_DELETE_BATCH_SIZE: Final = 5_000
_SQL: Final = load_statements("tidegate.catalog.sql", "partitions.sql")


class Busy(Exception):
    """Another process is maintaining the table."""


class PartitionedTable(msgspec.Struct, frozen=True):
    """A table of which rows expire.

    Args:
        name: of the table.
        column: the rows' time, µs since the epoch.
        lock: id of the advisory lock of the maintenance.
        kind: what the rows are, for log lines.
        monthly: one partition per month instead of one per day.
    """

    name: str
    column: str
    lock: int
    kind: str
    monthly: bool = False

    def partition_of(self, at_us: int) -> str:
        """The name of the partition of a time, e.g. `rate_limit_violations_20261125`, or `usage_ledger_202611` of a month."""
        return f"{self.name}_{self._start(at_us):{'%Y%m' if self.monthly else '%Y%m%d'}}"

    async def maintain(self, database: Database, keep_days: int, now_us: int | None = None) -> bool:
        """Create the partitions of the current period and the next ones, and delete expired rows.

        Rows of such a period in the default partition are moved to its partition, unless there are more than 100,000. A period
        expires `keep_days` after its end. Waits at most 1 s for each lock.

        Args:
            keep_days: retention, days, 1 or more.
            now_us: µs since the epoch; None for the database's clock.

        Returns:
            Whether it was done; False if another process is doing it.

        Raises:
            CatalogUnavailable: if a step failed; the others were done.
        """
        if database.dialect == "sqlite":
            now_us = timestamps.now_us() if now_us is None else now_us
            return await run_steps([functools.partial(self._delete_old, database, now_us - keep_days * DAY_US)])
        async with database.transaction() as connection:
            if now_us is None:
                now_us = await clock_us(connection)
            existing = await self._partitions(connection)
        before_us = now_us - keep_days * DAY_US
        pattern = re.compile(rf"{self.name}_\d{{{6 if self.monthly else 8}}}", re.ASCII)
        # Names of partitions sort like their periods.
        old = sorted(name for name in existing if pattern.fullmatch(name) and name < self.partition_of(before_us))
        return await run_steps(
            [
                *(functools.partial(self._create, database, *period) for period in self._periods(now_us)),
                *(functools.partial(self._drop, database, name) for name in old),
                functools.partial(self._delete_old, database, before_us),
            ]
        )

    @contextlib.asynccontextmanager
    async def exclusive(self, database: Database) -> AsyncIterator[AsyncConnection]:
        """A transaction under the advisory lock of the maintenance.

        Raises:
            Busy: if another process has the lock.
            CatalogUnavailable: if the database rejects the transaction.
        """
        async with database.transaction() as connection:
            if database.dialect == "postgresql":
                if not (await connection.execute(text(_SQL["advisory_lock"]), {"lock": self.lock})).scalar_one():
                    raise Busy
                await connection.execute(text(_SQL["lock_timeout"]))
            yield connection

    def _start(self, at_us: int) -> datetime.datetime:
        day = datetime.datetime.fromtimestamp(at_us // 1_000_000, datetime.UTC)
        return day.replace(day=1) if self.monthly else day

    def _periods(self, now_us: int) -> list[tuple[int, int]]:
        """First µs and end of the current period and the next ones."""
        starts = [_midnight_us(self._start(now_us))]
        while len(starts) < AHEAD + 2:
            # 31 days after the first of a month are in the next month.
            following = starts[-1] + (31 if self.monthly else 1) * DAY_US
            starts.append(_midnight_us(self._start(following)))
        return list(itertools.pairwise(starts))

    def _sql(self, name: str, **inserted: object) -> str:
        return _SQL[name].format(table=self.name, column=self.column, **inserted)

    async def _partitions(self, connection: AsyncConnection) -> list[str]:
        return list((await connection.execute(text(self._sql("partitions")))).scalars())

    async def _create(self, database: Database, from_us: int, to_us: int) -> None:
        name = self.partition_of(from_us)
        period = {"from_us": from_us, "to_us": to_us}
        async with self.exclusive(database) as connection:
            # Checked under the lock: another process may have created it just before.
            if name in await self._partitions(connection):
                return
            count = (await connection.execute(text(self._sql("in_default")), {**period, "max_rows": _MAX_MOVED + 1})).scalar_one()
            if count > _MAX_MOVED:
                logger.warning(
                    "%s of %s stay in the default partition: there are more than %d",
                    self.kind,
                    name.rpartition("_")[2],
                    _MAX_MOVED,
                )
                return
            for step in ("lock_parent", "lock_default", "create"):
                await connection.execute(text(self._sql(step, partition=name)))
            await connection.execute(text(self._sql("move", partition=name)), period)
            await connection.execute(text(self._sql("attach", partition=name, **period)))

    async def _drop(self, database: Database, name: str) -> None:
        async with self.exclusive(database) as connection:
            if name in await self._partitions(connection):
                await connection.execute(text(self._sql("drop", partition=name)))

    async def _delete_old(self, database: Database, before_us: int) -> None:
        """In batches, so that writers can write in between."""
        statement = text(self._sql(f"delete_{database.dialect}"))
        deleted = _DELETE_BATCH_SIZE
        while deleted == _DELETE_BATCH_SIZE:
            async with self.exclusive(database) as connection:
                result: CursorResult[Any] = await connection.execute(
                    statement, {"before_us": before_us, "max_rows": _DELETE_BATCH_SIZE}
                )
                deleted = result.rowcount


async def clock_us(connection: AsyncConnection) -> int:
    """The time by PostgreSQL's clock, µs since the epoch."""
    return int((await connection.execute(text(_SQL["clock"]))).scalar_one())


async def run_steps(steps: Iterable[Callable[[], Awaitable[None]]]) -> bool:
    """Run steps one after another, also after a failed one; returns False if another process is maintaining the table.

    Raises:
        CatalogUnavailable: if a step failed; the others were done.
    """
    failed: CatalogUnavailable | None = None
    for step in steps:
        try:
            await step()
        except Busy:
            return False  # the other process runs all steps
        except CatalogUnavailable as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return True


def is_moved_partition(error: Exception) -> bool:
    """Whether an insert failed because the partition of its period was attached meanwhile: the next attempt finds it."""
    return isinstance(error.__cause__, IntegrityError)


def _midnight_us(day: datetime.datetime) -> int:
    return timestamps.to_us(day.replace(hour=0, minute=0, second=0, microsecond=0))
