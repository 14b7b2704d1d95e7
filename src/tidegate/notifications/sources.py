"""Events of API keys and blocks, read from the catalog.

Every process reads them, and all make the same rows of them. What happened up to `LOOK_BACK_S` before a process started is read
too, so that nothing is missed while processes restart.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import RowMapping, func, select, tuple_

from tidegate.catalog.sql.database import Database
from tidegate.catalog.sql.tables import api_keys, audit_log, customers, tiers
from tidegate.notifications.events import Event
from tidegate.policy.notify import EventType
from tidegate.timestamps import format_timestamp

LOOK_BACK_S: Final = 3600
_BATCH: Final = 500


class ExpiredKeys:
    """API keys whose time is over.

    Args:
        since_us: those that expired after this moment, µs since the epoch.
    """

    def __init__(self, database: Database, since_us: int) -> None:
        self._database = database
        self._last: tuple[int, str] = (since_us, "")

    async def read(self, now_us: int) -> list[Event]:
        """Those that expired since the last call; some of them if there are many.

        Raises:
            CatalogUnavailable: if the database does not answer.
        """
        c = api_keys.c
        query = (
            select(c.id, c.name, c.expires_at_us, tiers.c.name.label("tier_name"), customers.c.name.label("customer_name"))
            .join(tiers, tiers.c.id == c.tier_id)
            .outerjoin(customers, customers.c.id == c.customer_id)
            .where(c.expires_at_us.is_not(None), c.expires_at_us >= self._last[0], c.expires_at_us <= now_us)
            .where(c.status == "active", tuple_(c.expires_at_us, c.id) > tuple_(*self._last))
            .order_by(c.expires_at_us, c.id)
            .limit(_BATCH)
        )
        async with self._database.reading() as connection:
            rows = (await connection.execute(query)).mappings().all()
        if rows:
            self._last = (rows[-1]["expires_at_us"], rows[-1]["id"])
        return [_expired(row) for row in rows]


class AuditedChanges:
    """API keys that were revoked, and blocks, in the audit log.

    Args:
        since_us: those after this moment, µs since the epoch; of the last entries only.
    """

    def __init__(self, database: Database, since_us: int) -> None:
        self._database = database
        self._since_us = since_us
        self._last: int | None = None

    async def read(self) -> list[Event]:
        """Those since the last call; some of them if there are many.

        Raises:
            CatalogUnavailable: if the database does not answer.
        """
        c = audit_log.c
        async with self._database.reading() as connection:
            if self._last is None:
                recent = select(c.id, c.at_us).order_by(c.id.desc()).limit(_BATCH).subquery()
                first = select(func.min(recent.c.id)).where(recent.c.at_us >= self._since_us)
                found = (await connection.execute(first)).scalar()
                newest = (await connection.execute(select(func.max(c.id)))).scalar()
                self._last = (newest or 0) if found is None else found - 1
            rows = (
                (await connection.execute(select(audit_log).where(c.id > self._last).order_by(c.id).limit(_BATCH)))
                .mappings()
                .all()
            )
        if rows:
            self._last = rows[-1]["id"]
        return [event for row in rows if (event := _audited(row)) is not None]


def _expired(row: RowMapping) -> Event:
    at_us = row["expires_at_us"]
    data = {
        "api_key_id": row["id"],
        "name": row["name"],
        "tier": row["tier_name"],
        "customer": row["customer_name"],
        "expired_at": format_timestamp(at_us),
    }
    return Event(EventType.KEY_EXPIRED, (row["id"], at_us), f"k:{row['id']}", at_us, data, row["tier_name"])


def _audited(row: RowMapping) -> Event | None:
    before, after = row["before"] or {}, row["after"] or {}
    if row["kind"] == "api_key" and after.get("status") == "revoked" and before.get("status") not in (None, "revoked"):
        data = {
            "api_key_id": row["target"],
            "name": after.get("name"),
            "tier": after.get("tier"),
            "customer": after.get("customer"),
            "reason": after.get("revoked_reason"),
            "revoked_at": format_timestamp(row["at_us"]),
            "by": row["actor"],
        }
        return Event(EventType.KEY_REVOKED, (row["id"],), f"k:{row['target']}", row["at_us"], data, after.get("tier"))
    if row["kind"] == "block" and row["action"] == "create":
        # As the control plane answers with it; what it is for is in one of the first fields.
        named = ("cidr", "api_key_id", "customer", "attribute", "until", "reason")
        data = {"block_id": int(row["target"]), **{name: after.get(name) for name in named}, "by": row["actor"]}
        return Event(EventType.BLOCKED, (row["id"],), f"b:{row['target']}", row["at_us"], data)
    return None
