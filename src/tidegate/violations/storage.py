"""Writes violations to the database, and deletes old ones.

PostgreSQL has one partition per day (UTC), which is dropped when it expires; rows without a partition of their day are in the
default one. Any number of processes may write and maintain concurrently: rows are written in the order of their keys, so that
writes do not deadlock, and an advisory lock lets one process at a time maintain the table.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Final, TypeAlias, cast

import msgspec
from sqlalchemy import CursorResult, String, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from tidegate import timestamps
from tidegate.catalog.sql.database import Database
from tidegate.catalog.sql.statements import load_statements
from tidegate.catalog.sql.tables import rate_limit_violations
from tidegate.errors import CatalogUnavailable

logger = logging.getLogger(__name__)

ViolationKey: TypeAlias = tuple[int, str, str, str]
"""Minute (µs since the epoch), tier, rule (empty for the tier's own limits), subject."""

OTHERS: Final = ""
"""The subject of the row with the blocked checks of a rule and minute that are not counted under another subject."""
MAX_ROWS: Final = 500
"""Maximum number of rows per transaction: bounds the time that other writers wait."""
DAYS_AHEAD: Final = 3

_DAY_US: Final = 86_400_000_000
_LOCK: Final = 0x7669_6F6C_6174_696F
"""Id of the advisory lock for the maintenance: "violatio" in ASCII."""
_MAX_MOVED: Final = 100_000
"""Moving this many rows takes about a second, during which they are locked."""
_DELETE_BATCH_SIZE: Final = 5_000
_PARTITION: Final = re.compile(r"rate_limit_violations_\d{8}", re.ASCII)
_SQL: Final = load_statements("tidegate.violations", "storage.sql")
_TEXTS: Final = [cast("String", rate_limit_violations.c[name].type).length or 0 for name in ("tier", "rule", "subject")]
"""Maximum length of each text, characters."""


class WriteUnconfirmed(CatalogUnavailable):
    """The connection was lost during a commit: the rows may or may not be written."""


class _Busy(Exception):
    """Another process is maintaining the table."""


async def write_violations(database: Database, rows: Iterable[tuple[ViolationKey, int]]) -> None:
    """Add counts to the table, in one transaction.

    Args:
        rows: keys, each once, and the numbers of blocked checks to add; at most `MAX_ROWS`. Texts too long for their column are
            shortened to distinct values.

    Raises:
        WriteUnconfirmed: if they may have been written: writing them again might count them twice.
        CatalogUnavailable: if the database rejects them; none was written.
    """
    fitted = sorted((minute_us, *map(_shorten, texts, _TEXTS), blocked) for (minute_us, *texts), blocked in rows)
    if not fitted:
        return
    parts = msgspec.json.encode(fitted).decode()
    for attempts_left in reversed(range(DAYS_AHEAD + 2)):
        committing = False
        try:
            async with database.transaction() as connection:
                await connection.execute(text(_SQL[f"add_{database.dialect}"]), {"parts": parts})
                committing = True
        except Exception as error:
            if committing:
                raise WriteUnconfirmed(f"{error}: the last rows may or may not be written") from error
            # The day's partition was attached during the insert into the default one: the next attempt finds it.
            if not attempts_left or not isinstance(error.__cause__, IntegrityError):
                raise
        else:
            return


async def maintain_table(database: Database, keep_days: int, now_us: int | None = None) -> bool:
    """Create the partitions of today and the next days, and delete expired violations.

    Rows of such a day in the default partition are moved to the day's partition, unless there are more than 100,000. A day
    expires `keep_days` after its end. Waits at most 1 s for each lock.

    Args:
        keep_days: retention of violations, days, 1 or more.
        now_us: µs since the epoch; None for the database's clock.

    Returns:
        Whether it was done; False if another process is doing it.

    Raises:
        CatalogUnavailable: if a step failed; the others were done.
    """
    if database.dialect == "sqlite":
        now_us = timestamps.now_us() if now_us is None else now_us
        return await _run_steps([functools.partial(_delete_old, database, now_us - keep_days * _DAY_US)])
    async with database.transaction() as connection:
        if now_us is None:
            now_us = int((await connection.execute(text(_SQL["clock"]))).scalar_one())
        existing = await _partitions(connection)
    before_us = now_us - keep_days * _DAY_US
    today_us = now_us - now_us % _DAY_US
    # Names of partitions sort like their days.
    old = sorted(name for name in existing if _PARTITION.fullmatch(name) and name < partition_of(before_us))
    return await _run_steps(
        [
            *(functools.partial(_create_partition, database, today_us + ahead * _DAY_US) for ahead in range(DAYS_AHEAD + 1)),
            *(functools.partial(_drop_partition, database, name) for name in old),
            functools.partial(_delete_old, database, before_us),
        ]
    )


def partition_of(at_us: int) -> str:
    """The name of the partition of a day, e.g. `rate_limit_violations_20261125`."""
    return f"rate_limit_violations_{datetime.datetime.fromtimestamp(at_us // 1_000_000, datetime.UTC):%Y%m%d}"


async def _run_steps(steps: Iterable[Callable[[], Awaitable[None]]]) -> bool:
    """Run steps one after another, also after a failed one; returns False if another process is maintaining the table."""
    failed: CatalogUnavailable | None = None
    for step in steps:
        try:
            await step()
        except _Busy:
            return False  # the other process runs all steps
        except CatalogUnavailable as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return True


@contextlib.asynccontextmanager
async def _exclusive_transaction(database: Database) -> AsyncIterator[AsyncConnection]:
    """A transaction under the advisory lock of the maintenance."""
    async with database.transaction() as connection:
        if database.dialect == "postgresql":
            if not (await connection.execute(text(_SQL["advisory_lock"]), {"lock": _LOCK})).scalar_one():
                raise _Busy
            await connection.execute(text(_SQL["lock_timeout"]))
        yield connection


async def _partitions(connection: AsyncConnection) -> list[str]:
    return list((await connection.execute(text(_SQL["partitions"]))).scalars())


async def _create_partition(database: Database, day_us: int) -> None:
    name = partition_of(day_us)
    day = {"from_us": day_us, "to_us": day_us + _DAY_US}
    async with _exclusive_transaction(database) as connection:
        # Checked under the lock: another process may have created it just before.
        if name in await _partitions(connection):
            return
        count = (await connection.execute(text(_SQL["in_default"]), {**day, "max_rows": _MAX_MOVED + 1})).scalar_one()
        if count > _MAX_MOVED:
            logger.warning("violations of %s stay in the default partition: there are more than %d", name[-8:], _MAX_MOVED)
            return
        for step in ("lock_parent", "lock_default", "create"):
            await connection.execute(text(_SQL[step].format(partition=name)))
        await connection.execute(text(_SQL["move"].format(partition=name)), day)
        await connection.execute(text(_SQL["attach"].format(partition=name, **day)))


async def _drop_partition(database: Database, name: str) -> None:
    async with _exclusive_transaction(database) as connection:
        if name in await _partitions(connection):
            await connection.execute(text(_SQL["drop"].format(partition=name)))


async def _delete_old(database: Database, before_us: int) -> None:
    """In batches, so that writers can write in between."""
    statement = text(_SQL[f"delete_{database.dialect}"])
    deleted = _DELETE_BATCH_SIZE
    while deleted == _DELETE_BATCH_SIZE:
        async with _exclusive_transaction(database) as connection:
            result: CursorResult[Any] = await connection.execute(
                statement, {"before_us": before_us, "max_rows": _DELETE_BATCH_SIZE}
            )
            deleted = result.rowcount


def _shorten(value: str, max_length: int) -> str:
    """A text that fits its column. A changed text ends in a digest, so that different texts stay different."""
    if value.isascii() and len(value) <= max_length and "\0" not in value:
        return value
    clean = value.encode(errors="replace").decode().replace("\0", "?")
    if clean == value and len(value) <= max_length:
        return value
    digest = hashlib.blake2b(value.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    return f"{clean[: max_length - 17]}~{digest}"
