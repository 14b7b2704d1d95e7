"""Violations in the database: adding to them, and keeping them for so many days.

PostgreSQL keeps each day (UTC) in a partition of its own, which is dropped as a whole; what no day's partition takes is in the
default one. Any number of processes may write and keep at once: rows are added in the order of their keys, so that no two wait
for each other, and of those that keep, one does at a time.
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
"""The subject of the row that holds what a rule blocked in a minute beyond the subjects that are named."""
MAX_ROWS: Final = 500
"""Most rows of one transaction: so long others wait for their turn."""
DAYS_AHEAD: Final = 3

_DAY_US: Final = 86_400_000_000
_LOCK: Final = 0x7669_6F6C_6174_696F
"""Names the lock of whoever keeps the violations: "violatio" in ASCII."""
_MAX_MOVED: Final = 100_000
"""Moving so many rows takes about a second, in which nobody reads or writes them."""
_DELETE_BATCH_SIZE: Final = 5_000
_PARTITION: Final = re.compile(r"rate_limit_violations_\d{8}", re.ASCII)
_SQL: Final = load_statements("tidegate.violations", "storage.sql")
_TEXTS: Final = [cast("String", rate_limit_violations.c[name].type).length or 0 for name in ("tier", "rule", "subject")]
"""How many characters each text may have."""


class WriteUnconfirmed(CatalogUnavailable):
    """The database went away before it said whether rows were written."""


class _Busy(Exception):
    """Another process keeps the violations now."""


async def write_violations(database: Database, rows: Iterable[tuple[ViolationKey, int]]) -> None:
    """Add to what is there, in one transaction.

    Args:
        rows: keys, each once, and how many checks were blocked besides; 500 of them or fewer, so that others need not wait long.
            Texts that a column cannot hold are clipped, and stay apart.

    Raises:
        WriteUnconfirmed: if it is not known whether they were written: writing them again might count them twice.
        CatalogUnavailable: if the database does not take them; none was written.
    """
    fitted = sorted((minute_us, *map(_fitted, texts, _TEXTS), blocked) for (minute_us, *texts), blocked in rows)
    if not fitted:
        return
    parts = msgspec.json.encode(fitted).decode()
    for tries_left in reversed(range(DAYS_AHEAD + 2)):
        committing = False
        try:
            async with database.transaction() as connection:
                await connection.execute(text(_SQL[f"add_{database.dialect}"]), {"parts": parts})
                committing = True
        except Exception as error:
            if committing:
                raise WriteUnconfirmed(f"{error}: the last rows may be there or not") from error
            # A day got its partition while its rows were on their way to the default one: now they find it, or the next day does.
            if not tries_left or not isinstance(error.__cause__, IntegrityError):
                raise
        else:
            return


async def keep_violations(database: Database, keep_days: int, now_us: int | None = None) -> bool:
    """Make partitions for today and the next days, and forget what is older than it is to be.

    Rows of such a day in the default partition are moved to its own; where they are more than 100,000, they stay. A day goes when
    its end is `keep_days` ago. No lock is waited for longer than 1 s.

    Args:
        keep_days: how long violations are kept, days, 1 or more.
        now_us: µs since the epoch; the database's clock where None.

    Returns:
        Whether it was done; False where another process does it now.

    Raises:
        CatalogUnavailable: if something could not be done; the rest was.
    """
    if database.dialect == "sqlite":
        now_us = timestamps.now_us() if now_us is None else now_us
        return await _taken([functools.partial(_delete_old, database, now_us - keep_days * _DAY_US)])
    async with database.transaction() as connection:
        if now_us is None:
            now_us = int((await connection.execute(text(_SQL["clock"]))).scalar_one())
        there = await _partitions(connection)
    before_us = now_us - keep_days * _DAY_US
    today_us = now_us - now_us % _DAY_US
    # Names of days sort as the days do.
    old = sorted(name for name in there if _PARTITION.fullmatch(name) and name < partition_of(before_us))
    return await _taken(
        [
            *(functools.partial(_make_day, database, today_us + ahead * _DAY_US) for ahead in range(DAYS_AHEAD + 1)),
            *(functools.partial(_drop_day, database, name) for name in old),
            functools.partial(_delete_old, database, before_us),
        ]
    )


def partition_of(at_us: int) -> str:
    """The partition of a day.

    Returns:
        Its name, such as `rate_limit_violations_20261125`.
    """
    return f"rate_limit_violations_{datetime.datetime.fromtimestamp(at_us // 1_000_000, datetime.UTC):%Y%m%d}"


async def _taken(steps: Iterable[Callable[[], Awaitable[None]]]) -> bool:
    """Take steps one after the other, those after a failed one too; False where another process is at it."""
    failed: CatalogUnavailable | None = None
    for step in steps:
        try:
            await step()
        except _Busy:
            return False  # whoever had the turn takes the other steps as well
        except CatalogUnavailable as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return True


@contextlib.asynccontextmanager
async def _exclusive_transaction(database: Database) -> AsyncIterator[AsyncConnection]:
    """A transaction that only one process has at a time."""
    async with database.transaction() as connection:
        if database.dialect == "postgresql":
            if not (await connection.execute(text(_SQL["turn"]), {"lock": _LOCK})).scalar_one():
                raise _Busy
            await connection.execute(text(_SQL["patience"]))
        yield connection


async def _partitions(connection: AsyncConnection) -> list[str]:
    return list((await connection.execute(text(_SQL["partitions"]))).scalars())


async def _make_day(database: Database, day_us: int) -> None:
    name = partition_of(day_us)
    day = {"from_us": day_us, "to_us": day_us + _DAY_US}
    async with _exclusive_transaction(database) as connection:
        # Looked at in our turn: another process may have made it a moment ago.
        if name in await _partitions(connection):
            return
        held = (await connection.execute(text(_SQL["in_default"]), {**day, "most": _MAX_MOVED + 1})).scalar_one()
        if held > _MAX_MOVED:
            logger.warning("violations of %s are kept in the default partition: there are more than %d", name[-8:], _MAX_MOVED)
            return
        for step in ("hold_parent", "hold_default", "make"):
            await connection.execute(text(_SQL[step].format(partition=name)))
        await connection.execute(text(_SQL["move"].format(partition=name)), day)
        await connection.execute(text(_SQL["attach"].format(partition=name, **day)))


async def _drop_day(database: Database, name: str) -> None:
    async with _exclusive_transaction(database) as connection:
        if name in await _partitions(connection):
            await connection.execute(text(_SQL["drop"].format(partition=name)))


async def _delete_old(database: Database, before_us: int) -> None:
    """A few at a time, so that writers get their turn in between."""
    statement = text(_SQL[f"delete_{database.dialect}"])
    deleted = _DELETE_BATCH_SIZE
    while deleted == _DELETE_BATCH_SIZE:
        async with _exclusive_transaction(database) as connection:
            result: CursorResult[Any] = await connection.execute(statement, {"before_us": before_us, "most": _DELETE_BATCH_SIZE})
            deleted = result.rowcount


def _fitted(value: str, most: int) -> str:
    """A text as a column can hold it. What had to be changed ends in a digest, so that two texts never become one."""
    if value.isascii() and len(value) <= most and "\0" not in value:
        return value
    clean = value.encode(errors="replace").decode().replace("\0", "?")
    if clean == value and len(value) <= most:
        return value
    digest = hashlib.blake2b(value.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    return f"{clean[: most - 17]}~{digest}"
