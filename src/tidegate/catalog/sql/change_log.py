"""The log of changes of the catalog, so that a cache invalidates what was touched and nothing else.

Every change writes rows into `catalog_changes` with its own version and the previous version, in its own transaction. A reader
that has version N follows this chain from the current version down to N. If the chain is broken, it is unknown what was touched,
and everything counts as touched: rows were pruned, an older Tidegate wrote the change, or N was never a version of this database,
because the primary that assigned it was lost before it was replicated. `Changes.floor` is the version from which on the log is
complete.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import delete, insert, select, true
from sqlalchemy.ext.asyncio import AsyncConnection

from tidegate.catalog.changes import ALL, MAX_READ, NONE, Changes, Item
from tidegate.catalog.sql.tables import catalog_changes, policy_state
from tidegate.errors import CatalogUnavailable

MAX_TOUCHED: Final = 500
"""A change that touches more items is logged as one that touches everything."""
KEPT_MS: Final = 86_400_000
"""Versions are ms since the epoch: each change prunes rows older than a day."""


class WriteTransaction:
    """A transaction that changes the catalog.

    Args:
        version: version of the catalog after the transaction.
        previous: version before it.
    """

    def __init__(self, connection: AsyncConnection, version: int, previous: int) -> None:
        self.connection = connection
        self.version = version
        self.previous = previous
        self._touched: set[Item] | None = None

    def touch(self, kind: str, name: str = "") -> None:
        """Record that an item changes. If nothing is recorded before the transaction ends, everything counts as changed.

        Args:
            kind: TIER, KEY, ANONYMOUS or NONE.
            name: name of the tier, or digest of the key.
        """
        if self._touched is None:
            self._touched = set()
        if kind != NONE:
            self._touched.add((kind, name))

    @property
    def items(self) -> list[Item]:
        """Touched items, as written to the log."""
        if self._touched is None or len(self._touched) > MAX_TOUCHED:
            return [(ALL, "")]
        return sorted(self._touched)

    async def log(self) -> None:
        """Write the touched items to the log, and prune old rows."""
        versions = {"version": self.version, "previous": self.previous}
        rows = [{**versions, "kind": kind, "name": name} for kind, name in self.items or [(NONE, "")]]
        await self.connection.execute(insert(catalog_changes), rows)
        await self.connection.execute(delete(catalog_changes).where(catalog_changes.c.version <= self.version - KEPT_MS))


def no_state() -> CatalogUnavailable:
    """The error for a database without its one row of `policy_state`, as during the restore of a backup."""
    return CatalogUnavailable("the catalog's database has no row in policy_state: restore a backup, or wait until it is restored")


async def read_changes(connection: AsyncConnection, since: int, max_rows: int = MAX_READ) -> Changes:
    """Read the changes after a version.

    Args:
        max_rows: maximum number of rows read, the latest ones.

    Returns:
        The changes. If `since` is not a version of this database (a failover lost the last commits), the changes are unknown: the
        floor is the current version.

    Raises:
        CatalogUnavailable: if `policy_state` is empty, as it is while a backup is being restored.
    """
    # One statement is one snapshot: a version without its rows would look like a change of an older Tidegate.
    # Limited before the join, so that only this part of the index is scanned.
    above = select(catalog_changes).where(catalog_changes.c.version > since)
    log = above.order_by(catalog_changes.c.version.desc()).limit(max_rows).subquery()
    query = (
        select(policy_state.c.version, log.c.version.label("changed"), log.c.previous, log.c.kind, log.c.name)
        .select_from(policy_state.outerjoin(log, true()))
        .order_by(log.c.version.desc())
    )
    rows = (await connection.execute(query)).all()
    if not rows:
        raise no_state()
    version = int(rows[0].version)
    if version < since:
        return Changes(version, version, versions=(version,))
    found: dict[Item, int] = {}
    versions = {version}
    # The chain is followed down: what is above `floor` is known, and `floor` is the version whose rows come next.
    at = floor = version
    for row in rows:
        if row.changed is None:
            break
        if row.changed != at:
            if row.changed != floor:
                break  # a version is missing
            at = row.changed
            versions.add(at)
        if row.kind == ALL:
            break
        floor = row.previous
        if row.kind != NONE:
            found.setdefault((row.kind, row.name), row.changed)
    else:
        if len(rows) == max_rows:
            floor = at  # rows of the lowest version may have been cut off
    if floor < since:
        return Changes(version, version, versions=(version,))
    items = sorted(((changed, item) for item, changed in found.items() if changed > floor), key=lambda each: each[0])
    return Changes(version, floor, tuple(items), tuple(sorted({*versions, floor})))
