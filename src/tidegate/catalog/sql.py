"""The catalog in a database, through SQLAlchemy Core. One body for every database; what differs stands in `schema`.

How it is connected to, and how a change is made one step, stands in `database`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import RowMapping, Select, insert, select, update

from tidegate.catalog import policy_rows
from tidegate.catalog.change_log import KEY, Changes, read_changes
from tidegate.catalog.database import Database, DatabaseOptions
from tidegate.catalog.gathering import Gathering
from tidegate.catalog.policy_applied import apply_file
from tidegate.catalog.tables import api_keys, policy_state, rate_limit_rules, tiers
from tidegate.errors import CatalogError
from tidegate.keys import hash_api_key, is_possible_key, make_api_key
from tidegate.policy import ApiKey, KeyStatus, Policy, Tier

_ID_PREFIX = re.compile(r"[0-9a-f]{6,24}", re.ASCII)


class KeyRow(msgspec.Struct, frozen=True):
    """An API key with its history.

    Args:
        api_key: the key's record.
        created_at_us: µs since the epoch.
        revoked_at_us: µs since the epoch; None while it is active.
        revoked_reason: as it was given.
    """

    api_key: ApiKey
    created_at_us: int
    revoked_at_us: int | None = None
    revoked_reason: str | None = None


class _NothingToDo(Exception):
    """Leaves a transaction that is to change nothing."""


class SqlCatalog:
    """A catalog in a database. Make it with `open`.

    Args:
        database: its schema up to date.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self._keys = Gathering(self._read_keys)

    @classmethod
    async def open(cls, url: str, options: DatabaseOptions | None = None) -> SqlCatalog:
        """Open a database, and bring its schema up to this version.

        Args:
            url: see `engines.open_engine`.
            options: how it is used.

        Returns:
            The catalog.

        Raises:
            SettingsError: if the database cannot be had; it says why.
        """
        return cls(await Database.open(url, options))

    async def api_key(self, sha256: str, least: int = 0) -> ApiKey | None:
        """See `Catalog.api_key`."""
        return (await self.read_key(sha256, least))[1]

    async def read_key(self, sha256: str, least: int = 0) -> tuple[int, ApiKey | None]:
        """See `VersionedCatalog.read_key`."""
        return await self._keys.get(sha256, least)

    async def tier(self, name: str, least: int = 0) -> Tier | None:
        """See `Catalog.tier`."""
        return (await self.read_tier(name, least))[1]

    async def read_tier(self, name: str, least: int = 0) -> tuple[int, Tier | None]:
        """See `VersionedCatalog.read_tier`."""
        # One statement: its answer is of one moment, on every database.
        query = (
            select(
                policy_state.c.version.label("seen"),
                tiers.c.name.label("tier_name"),
                tiers.c.limits.label("tier_limits"),
                tiers.c.managed_by_file.label("tier_managed_by_file"),
                rate_limit_rules,
            )
            .select_from(
                policy_state.outerjoin(tiers, tiers.c.name == name).outerjoin(
                    rate_limit_rules, rate_limit_rules.c.tier_id == tiers.c.id
                )
            )
            .order_by(rate_limit_rules.c.position, rate_limit_rules.c.id)
        )
        rows = await self.database.seen(query, least)
        first = rows[0]
        if first["tier_name"] is None:
            return first["seen"], None
        tier = {"name": first["tier_name"], "limits": first["tier_limits"], "managed_by_file": first["tier_managed_by_file"]}
        return first["seen"], policy_rows.tier_of(tier, rows if first["id"] is not None else ())

    async def tier_names(self) -> list[str]:
        """See `Catalog.tier_names`."""
        async with self.database.reading() as connection:
            names = (await connection.execute(select(tiers.c.name))).scalars().all()
        # Not ordered by the database: each collates in its own way.
        return sorted(names)

    async def anonymous_tier(self, least: int = 0) -> str | None:
        """See `Catalog.anonymous_tier`."""
        return (await self.read_anonymous(least))[1]

    async def read_anonymous(self, least: int = 0) -> tuple[int, str | None]:
        """See `VersionedCatalog.read_anonymous`."""
        row = (await self.database.seen(select(policy_state.c.version.label("seen"), policy_state.c.anonymous_tier), least))[0]
        return row["seen"], row["anonymous_tier"]

    async def changes(self, since: int) -> Changes:
        """See `VersionedCatalog.changes`."""
        async with self.database.reading() as connection:
            changes = await read_changes(connection, since)
        if self.database.replicas is not None:
            self.database.replicas.changed(*changes.versions)
        return changes

    async def version(self) -> int:
        """See `Catalog.version`."""
        return await self.database.version()

    async def ping(self) -> None:
        """See `Catalog.ping`."""
        await self.version()

    async def close(self) -> None:
        """See `Catalog.close`."""
        await self.database.close()

    async def list_tiers(self) -> list[Tier]:
        """All tiers with their rules, by name.

        Returns:
            The tiers.

        Raises:
            CatalogUnavailable: if the database does not answer.
        """
        async with self.database.reading() as connection:
            rows = (await connection.execute(select(tiers).order_by(tiers.c.name))).mappings().all()
            rules: dict[int, list[RowMapping]] = {}
            ordered = select(rate_limit_rules).order_by(rate_limit_rules.c.position, rate_limit_rules.c.id)
            for rule in (await connection.execute(ordered)).mappings():
                rules.setdefault(rule["tier_id"], []).append(rule)
        return [policy_rows.tier_of(row, rules.get(row["id"], ())) for row in rows]

    async def list_keys(self, tier: str | None = None, limit: int = 100, after: str | None = None) -> list[KeyRow]:
        """API keys by id.

        Args:
            tier: only those of this tier.
            limit: at most so many, 1 or more.
            after: only those behind this id: the last one of the page before.

        Returns:
            The keys.

        Raises:
            CatalogUnavailable: if the database does not answer.
        """
        query = _keys().order_by(api_keys.c.id).limit(limit)
        if tier is not None:
            # With a condition on the join instead, PostgreSQL would read and sort all keys of the tier for each page.
            query = query.where(api_keys.c.tier_id == select(tiers.c.id).where(tiers.c.name == tier).scalar_subquery())
        if after is not None:
            query = query.where(api_keys.c.id > after)
        async with self.database.reading() as connection:
            rows = (await connection.execute(query)).mappings().all()
        return [
            KeyRow(policy_rows.api_key_of(row), row["created_at_us"], row["revoked_at_us"], row["revoked_reason"]) for row in rows
        ]

    async def create_key(self, tier: str, name: str = "", expires_at_us: int | None = None) -> tuple[str, ApiKey]:
        """Make an API key; only its digest is stored.

        Args:
            tier: name of its tier.
            name: a label for people, at most 200 characters.
            expires_at_us: µs since the epoch, None for never.

        Returns:
            The key itself, this once, and its record.

        Raises:
            CatalogError: if there is no such tier or the name is too long.
            CatalogUnavailable: if the database does not answer.
        """
        if len(name) > 200:
            raise CatalogError(f"the name has {len(name)} characters: at most 200 are kept")
        _require_storable("the name", name)
        async with self.database.changing() as writing:
            connection = writing.connection
            row = (await connection.execute(select(tiers).where(tiers.c.name == tier))).mappings().first()
            if row is None:
                names = (await connection.execute(select(tiers.c.name).order_by(tiers.c.name))).scalars().all()
                raise CatalogError(f"there is no tier {tier!r}: there are {', '.join(names) or 'none yet; apply a policy first'}")
            api_key = make_api_key()
            record = ApiKey(hash_api_key(api_key), tier, name=name, expires_at_us=expires_at_us)
            writing.touch(KEY, record.sha256)
            await connection.execute(insert(api_keys).values(policy_rows.row_of_api_key(record, row["id"], _now_us())))
        return api_key, record

    async def revoke_key(self, key: str, reason: str) -> ApiKey:
        """Revoke an API key.

        Args:
            key: its id, a beginning of the id of 6 digits or more that only it has, or the key itself.
            reason: why, at most 1000 characters.

        Returns:
            The key's record, revoked.

        Raises:
            CatalogError: if no key or several are meant, or the policy file owns it.
            CatalogUnavailable: if the database does not answer.
        """
        if not reason.strip() or len(reason) > 1000:
            raise CatalogError("a reason of 1 to 1000 characters is needed: for those who look later")
        _require_storable("the reason", reason)
        async with self.database.changing() as writing:
            connection = writing.connection
            rows = (await connection.execute(_found(key))).mappings().all()
            if len(rows) != 1:
                raise CatalogError(
                    "no API key is meant by that: give the id as 'tidegate keys list' shows it"
                    if not rows
                    else f"several API keys begin with {key!r}: give more of the id"
                )
            record = policy_rows.api_key_of(rows[0])
            if record.managed_by_file:
                raise CatalogError(f"the API key {record.id} stands in the policy file: set its status to revoked there")
            if record.status is KeyStatus.REVOKED:
                raise CatalogError(f"the API key {record.id} is revoked already")
            writing.touch(KEY, record.sha256)
            await connection.execute(
                update(api_keys)
                .where(api_keys.c.id == record.id)
                .values(status=KeyStatus.REVOKED.value, revoked_at_us=_now_us(), revoked_reason=reason)
            )
        return msgspec.structs.replace(record, status=KeyStatus.REVOKED)

    async def apply_policy(self, policy: Policy, digest: str) -> bool:
        """Make the rows that the policy file owns equal to it; leave all others alone.

        Args:
            policy: the file's policy.
            digest: of the policy; where it is the one applied last, nothing is done.

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
                # Another instance may have applied the same file while this one waited for its turn.
                if (await writing.connection.execute(select(policy_state.c.file_digest))).scalar() == digest:
                    raise _NothingToDo
                await apply_file(writing, policy, digest)
        except _NothingToDo:
            return False
        return True

    async def _read_keys(self, sha256s: Sequence[str], least: int) -> tuple[int, dict[str, ApiKey]]:
        # One statement: its answer is of one moment, on every database.
        held = api_keys.join(tiers, tiers.c.id == api_keys.c.tier_id)
        query = select(policy_state.c.version.label("seen"), api_keys, tiers.c.name.label("tier_name")).select_from(
            policy_state.outerjoin(held, api_keys.c.sha256.in_(sha256s))
        )
        rows = await self.database.seen(query, least)
        return rows[0]["seen"], {row["sha256"]: policy_rows.api_key_of(row) for row in rows if row["id"] is not None}


def _keys() -> Select[Any]:
    return select(api_keys, tiers.c.name.label("tier_name")).join(tiers, tiers.c.id == api_keys.c.tier_id)


def _found(key: str) -> Select[Any]:
    """The keys that a person may mean: by a beginning of the id, or by the key itself."""
    if _ID_PREFIX.fullmatch(key):
        # 'g' sorts behind every hex digit: a range that the primary key's index answers, on any database.
        return _keys().where(api_keys.c.id >= key, api_keys.c.id < key + "g").limit(2)
    if not is_possible_key(key):
        raise CatalogError("that is neither an id (6 hex digits or more) nor an API key: see 'tidegate keys list'")
    return _keys().where(api_keys.c.sha256 == hash_api_key(key))


def _require_storable(what: str, text: str) -> None:
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text):
        raise CatalogError(f"{what} has a NUL or a character that is not UTF-8, which no database keeps: leave it out")


def _now_us() -> int:
    return time.time_ns() // 1000
