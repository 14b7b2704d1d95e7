"""The catalog in a database, through SQLAlchemy Core. One implementation for SQLite and PostgreSQL; `engine` and `schema` contain
the differences, `database` the connections and write transactions.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import ColumnElement, RowMapping, Select, bindparam, case, func, literal, or_, select, tuple_, update

from tidegate.catalog.blocks import Block
from tidegate.catalog.caller_tokens import MAX_LIVE, CallerToken
from tidegate.catalog.changes import Changes
from tidegate.catalog.sql import rows as policy_rows
from tidegate.catalog.sql.batch_loader import BatchLoader
from tidegate.catalog.sql.change_log import read_changes
from tidegate.catalog.sql.customers import CustomerReader, padded
from tidegate.catalog.sql.database import Database, DatabaseOptions
from tidegate.catalog.sql.override_rows import read_all_overrides
from tidegate.catalog.sql.policy_file import Released, apply_file, release_file
from tidegate.catalog.sql.tables import (
    api_keys,
    blocks,
    caller_tokens,
    customers,
    policy_state,
    rate_limit_rules,
    subject_overrides,
    tiers,
)
from tidegate.policy.attributes import CallerPolicy
from tidegate.policy.customers import Customer
from tidegate.policy.model import ApiKey, Policy, Tier
from tidegate.policy.networks import NEVER
from tidegate.timestamps import now_us

_SHA256S: Final = "sha256s"
# One statement: its result is one snapshot on every database. Built once: building it costs as much as sending it.
_KEYS: Final = select(
    policy_state.c.version.label("read_version"),
    api_keys,
    tiers.c.name.label("tier_name"),
    customers.c.name.label("customer_name"),
).select_from(
    policy_state.outerjoin(
        api_keys.join(tiers, tiers.c.id == api_keys.c.tier_id).outerjoin(customers, customers.c.id == api_keys.c.customer_id),
        api_keys.c.sha256.in_(bindparam(_SHA256S, expanding=True)),
    )
)

_TIER_COLUMNS: Final = (*policy_rows.TIER_COLUMNS, "managed_by_file")


def live_caller_tokens() -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """Conditions that hold for the callers' tokens that are neither revoked nor expired."""
    expires_at_us = caller_tokens.c.expires_at_us
    return caller_tokens.c.revoked_at_us.is_(None), or_(expires_at_us.is_(None), expires_at_us > now_us())


def holding_blocks() -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """Conditions that hold for blocks that neither were removed nor have ended."""
    return blocks.c.ended_at_us.is_(None), or_(blocks.c.until_us.is_(None), blocks.c.until_us > now_us())


class _NothingToDo(Exception):
    """Ends a transaction that has nothing to change, by a rollback."""


class SqlCatalog:
    """A catalog in a database. Make it with `open`."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._keys = BatchLoader(self._read_keys)
        self._customers = CustomerReader(database)

    @classmethod
    async def open(cls, url: str, options: DatabaseOptions | None = None) -> SqlCatalog:
        """Open a database, and bring its schema up to this version.

        Raises:
            SettingsError: if the database cannot be opened, with the reason.
        """
        return cls(await Database.open(url, options))

    async def api_key(self, sha256: str, min_version: int = 0) -> tuple[int, ApiKey | None]:
        """See `Catalog.api_key`."""
        return await self._keys.get(sha256, min_version)

    async def tier(self, name: str, min_version: int = 0) -> tuple[int, Tier | None]:
        """See `Catalog.tier`."""
        # One statement: its result is one snapshot on every database. The first row has the overrides, or each rule would carry
        # them again.
        place = func.row_number().over(order_by=(rate_limit_rules.c.position, rate_limit_rules.c.id))
        query = (
            select(
                policy_state.c.version.label("read_version"),
                tiers.c.name.label("tier_name"),
                *(tiers.c[column].label(f"tier_{column}") for column in _TIER_COLUMNS),
                case((place == 1, subject_overrides.c.entries)).label("tier_overrides"),
                rate_limit_rules,
            )
            .select_from(
                policy_state.outerjoin(tiers, tiers.c.name == name)
                .outerjoin(subject_overrides, subject_overrides.c.tier_id == tiers.c.id)
                .outerjoin(rate_limit_rules, rate_limit_rules.c.tier_id == tiers.c.id)
            )
            .order_by(rate_limit_rules.c.position, rate_limit_rules.c.id)
        )
        rows = await self.database.read(query, min_version)
        first = rows[0]
        if first["tier_name"] is None:
            return first["read_version"], None
        tier = {"name": first["tier_name"], **{column: first[f"tier_{column}"] for column in _TIER_COLUMNS}}
        return first["read_version"], policy_rows.tier_of(tier, rows if first["id"] is not None else (), first["tier_overrides"])

    async def customer(self, name: str, min_version: int = 0) -> tuple[int, Customer | None]:
        """See `Catalog.customer`."""
        return await self._customers.customer(name, min_version)

    async def customer_name(self, digest: str, min_version: int = 0) -> tuple[int, str]:
        """See `Catalog.customer_name`."""
        return await self._customers.customer_name(digest, min_version)

    async def tier_names(self) -> list[str]:
        """See `Catalog.tier_names`."""
        async with self.database.reading() as connection:
            names = (await connection.execute(select(tiers.c.name))).scalars().all()
        # Not ordered by the database: collations differ.
        return sorted(names)

    async def caller_policy(self, min_version: int = 0) -> tuple[int, CallerPolicy]:
        """See `Catalog.caller_policy`."""
        columns = tuple(policy_state.c[name] for name in policy_rows.CALLER_POLICY_COLUMNS)
        query = select(policy_state.c.version.label("read_version"), *columns)
        row = (await self.database.read(query, min_version))[0]
        return row["read_version"], policy_rows.caller_policy_of(row)

    async def changes(self, since: int) -> Changes:
        """See `Catalog.changes`."""
        async with self.database.reading() as connection:
            changes = await read_changes(connection, since)
        if self.database.replicas is not None:
            self.database.replicas.changed(*changes.versions)
        return changes

    async def version(self) -> int:
        """See `Catalog.version`."""
        return await self.database.version()

    async def ping(self) -> None:
        """See `Catalog.ping`; fails also if the database answers but is not writable."""
        await self.database.ping()

    async def close(self) -> None:
        """See `Catalog.close`."""
        await self.database.close()

    async def caller_tokens(self) -> list[CallerToken]:
        """See `CallerTokenSource.caller_tokens`. Read from the primary: a replica may not have a revocation yet."""
        query = select(caller_tokens).where(*live_caller_tokens()).limit(MAX_LIVE)
        async with self.database.reading() as connection:
            rows = (await connection.execute(query)).mappings().all()
        return [CallerToken(row["sha256"], row["name"], frozenset(row["scopes"]), row["expires_at_us"]) for row in rows]

    async def holding_blocks(self, after_id: int, limit: int) -> list[Block]:
        """See `BlockSource.holding_blocks`. Read from the primary, as callers' tokens are."""
        query = select(blocks).where(blocks.c.id > after_id, *holding_blocks()).order_by(blocks.c.id).limit(limit)
        return await self._read_blocks(query)

    async def changed_blocks(self, version: int, after_id: int, limit: int) -> list[Block]:
        """See `BlockSource.changed_blocks`. Read from the primary, as callers' tokens are."""
        place = tuple_(blocks.c.version, blocks.c.id) > tuple_(literal(version), literal(after_id))
        return await self._read_blocks(select(blocks).where(place).order_by(blocks.c.version, blocks.c.id).limit(limit))

    async def _read_blocks(self, query: Select[Any]) -> list[Block]:
        async with self.database.reading() as connection:
            return [
                Block(
                    row.id,
                    row.kind,
                    row.target,
                    NEVER if row.until_us is None else row.until_us,
                    row.message,
                    row.ended_at_us is not None,
                    row.version,
                )
                for row in await connection.execute(query)
            ]

    async def list_tiers(self) -> list[Tier]:
        """All tiers with their rules, by name.

        Raises:
            CatalogUnavailable: if the database does not answer.
        """
        async with self.database.reading() as connection:
            rows = (await connection.execute(select(tiers).order_by(tiers.c.name))).mappings().all()
            rules: dict[int, list[RowMapping]] = {}
            ordered = select(rate_limit_rules).order_by(rate_limit_rules.c.position, rate_limit_rules.c.id)
            for rule in (await connection.execute(ordered)).mappings():
                rules.setdefault(rule["tier_id"], []).append(rule)
            overrides = await read_all_overrides(connection)
        return [policy_rows.tier_of(row, rules.get(row["id"], ()), overrides.get(row["id"])) for row in rows]

    async def apply_policy(self, policy: Policy, digest: str) -> bool:
        """Update the rows that the policy file owns to match it; other rows are not changed.

        Args:
            digest: digest of the policy; if it equals the one applied last, nothing is done.

        Returns:
            Whether anything was changed.

        Raises:
            CatalogError: if the file contradicts rows that it does not own; nothing was changed.
            CatalogUnavailable: if the database does not answer; nothing was changed.
        """
        async with self.database.reading() as connection:
            if (await connection.execute(select(policy_state.c.file_digest))).scalar() == digest:
                return False
        try:
            async with self.database.changing() as writing:
                # Another instance may have applied the same file while this one waited for the write lock.
                if (await writing.connection.execute(select(policy_state.c.file_digest))).scalar() == digest:
                    raise _NothingToDo
                await apply_file(writing, policy, digest)
        except _NothingToDo:
            return False
        return True

    async def release_policy(self) -> Released | None:
        """Release the rows of a policy file that is no longer configured, so that operators can change them.

        Returns:
            What was released; None if no file was active.

        Raises:
            CatalogUnavailable: if the database does not answer; nothing was changed.
        """
        async with self.database.reading() as connection:
            if (await connection.execute(select(policy_state.c.file_digest))).scalar() is None:
                return None
        try:
            async with self.database.changing() as writing:
                released = await release_file(writing, "tidegate serve")
                if released is None:
                    raise _NothingToDo
        except _NothingToDo:
            return None
        return released

    async def cache_secret(self) -> bytes:
        """The secret that seals entries of the shared cache, the same for all instances of this database. Created at the first
        call.

        Returns:
            32 random bytes, in hex.

        Raises:
            CatalogUnavailable: if the database does not answer, or is not writable.
        """
        secret = select(policy_state.c.cache_secret)
        async with self.database.reading() as connection:
            stored = (await connection.execute(secret)).scalar()
        if stored is None:
            unset = update(policy_state).where(policy_state.c.cache_secret.is_(None))
            async with self.database.transaction() as connection:
                # Of two instances that start at once, the second reads the secret of the first.
                await connection.execute(unset.values(cache_secret=secrets.token_hex(32)))
                stored = (await connection.execute(secret)).scalar_one()
        return str(stored).encode()

    async def _read_keys(self, sha256s: Sequence[str], min_version: int) -> tuple[int, dict[str, ApiKey]]:
        rows = await self.database.read(_KEYS, min_version, {_SHA256S: padded(sha256s)})
        return rows[0]["read_version"], {row["sha256"]: policy_rows.api_key_of(row) for row in rows if row["id"] is not None}
