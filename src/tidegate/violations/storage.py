"""Writes violations to the database, and deletes old ones.

PostgreSQL has one partition per day (UTC), which is dropped when it expires; rows without a partition of their day are in the
default one. Any number of processes may write and maintain concurrently: rows are written in the order of their keys, so that
writes do not deadlock, and an advisory lock lets one process at a time maintain the table.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeAlias, cast

import msgspec
from sqlalchemy import String, text

from tidegate.catalog.sql.column_text import shorten
from tidegate.catalog.sql.database import Database
from tidegate.catalog.sql.partitions import AHEAD, PartitionedTable, is_moved_partition
from tidegate.catalog.sql.statements import load_statements
from tidegate.catalog.sql.tables import rate_limit_violations
from tidegate.errors import CatalogUnavailable

ViolationKey: TypeAlias = tuple[int, str, str, str]
"""Minute (µs since the epoch), tier, rule (empty for the tier's own limits), subject."""

OTHERS: Final = ""
"""The subject of the row with the blocked checks of a rule and minute that are not counted under another subject."""
MAX_ROWS: Final = 500
"""Maximum number of rows per transaction: bounds the time that other writers wait."""
TABLE: Final = PartitionedTable("rate_limit_violations", "minute_us", 0x7669_6F6C_6174_696F, "violations")
"""The id of its advisory lock is "violatio" in ASCII."""

SHADOW_TABLE: Final = PartitionedTable("shadow_violations", "minute_us", 0x7368_6164_6F77_7669, "shadow violations")
"""What shadow rules would have blocked; the id of its lock is "shadowvi"."""

_SQL: Final = load_statements("tidegate.violations", "storage.sql")
_STATEMENTS: Final = {
    (table.name, dialect): _SQL[f"add_{dialect}"].replace(TABLE.name, table.name)
    for table in (TABLE, SHADOW_TABLE)
    for dialect in ("postgresql", "sqlite")
}
_TEXTS: Final = [cast("String", rate_limit_violations.c[name].type).length or 0 for name in ("tier", "rule", "subject")]
"""Maximum length of each text, characters."""


class WriteUnconfirmed(CatalogUnavailable):
    """The connection was lost during a commit: the rows may or may not be written."""


async def write_violations(database: Database, rows: Iterable[tuple[ViolationKey, int]], table: PartitionedTable = TABLE) -> None:
    """Add counts to the table, in one transaction.

    Args:
        table: `TABLE` or `SHADOW_TABLE`.
        rows: keys, each once, and the numbers of blocked checks to add; at most `MAX_ROWS`. Texts too long for their column are
            shortened to distinct values.

    Raises:
        WriteUnconfirmed: if they may have been written: writing them again might count them twice.
        CatalogUnavailable: if the database rejects them; none was written.
    """
    fitted = sorted((minute_us, *map(shorten, texts, _TEXTS), blocked) for (minute_us, *texts), blocked in rows)
    if not fitted:
        return
    parts = msgspec.json.encode(fitted).decode()
    for attempts_left in reversed(range(AHEAD + 2)):
        committing = False
        try:
            async with database.transaction() as connection:
                await connection.execute(text(_STATEMENTS[table.name, database.dialect]), {"parts": parts})
                committing = True
        except Exception as error:
            if committing:
                raise WriteUnconfirmed(f"{error}: the last rows may or may not be written") from error
            # The day's partition was attached during the insert into the default one: the next attempt finds it.
            if not attempts_left or not is_moved_partition(error):
                raise
        else:
            return


async def maintain_table(database: Database, keep_days: int, now_us: int | None = None, table: PartitionedTable = TABLE) -> bool:
    """Create the partitions of today and the next days, and delete expired violations; see `PartitionedTable.maintain`.

    Args:
        keep_days: retention of violations, days, 1 or more.
        now_us: µs since the epoch; None for the database's clock.
        table: `TABLE` or `SHADOW_TABLE`.

    Returns:
        Whether it was done; False if another process is doing it.

    Raises:
        CatalogUnavailable: if a step failed; the others were done.
    """
    return await table.maintain(database, keep_days, now_us)


def partition_of(at_us: int) -> str:
    """The name of the partition of a day, e.g. `rate_limit_violations_20261125`."""
    return TABLE.partition_of(at_us)
