"""The catalog in a database, through SQLAlchemy Core. One body for every database; what differs stands in `schema`.

Every change is one transaction that first takes the row of `policy_state`: writers of all processes go one after the other,
and each raises the version by which the others find out.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from sqlalchemy import RowMapping, Select, delete, insert, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tidegate.catalog import policy_rows
from tidegate.catalog.schema import open_engine, upgrade_schema
from tidegate.catalog.tables import api_keys, policy_state, rate_limit_rules, tiers
from tidegate.errors import CatalogError, CatalogUnavailable
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


async def upgrade(url: str) -> str:
    """Bring a database's schema up to this version.

    Args:
        url: of the catalog.

    Returns:
        The revision.

    Raises:
        SettingsError: if it cannot be done; it says why.
    """
    engine = open_engine(url)
    try:
        return await upgrade_schema(engine)
    finally:
        await engine.dispose()


class SqlCatalog:
    """A catalog in a database. Make it with `open`.

    Args:
        engine: the database, its schema up to date.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @classmethod
    async def open(cls, url: str) -> SqlCatalog:
        """Open a database, and bring its schema up to this version.

        Args:
            url: `sqlite:///relative.db`, `sqlite:////absolute.db`, or `sqlite://` for memory.

        Returns:
            The catalog.

        Raises:
            SettingsError: if the database cannot be had; it says why.
        """
        engine = open_engine(url)
        try:
            await upgrade_schema(engine)
        except BaseException:
            await engine.dispose()
            raise
        return cls(engine)

    async def api_key(self, sha256: str) -> ApiKey | None:
        """See `Catalog.api_key`."""
        async with self._reading() as connection:
            row = (await connection.execute(_keys().where(api_keys.c.sha256 == sha256))).mappings().first()
        return None if row is None else policy_rows.api_key_of(row)

    async def tier(self, name: str) -> Tier | None:
        """See `Catalog.tier`."""
        async with self._reading() as connection:
            row = (await connection.execute(select(tiers).where(tiers.c.name == name))).mappings().first()
            if row is None:
                return None
            rules = await connection.execute(
                select(rate_limit_rules)
                .where(rate_limit_rules.c.tier_id == row["id"])
                .order_by(rate_limit_rules.c.position, rate_limit_rules.c.id)
            )
            return policy_rows.tier_of(row, rules.mappings())

    async def tier_names(self) -> list[str]:
        """See `Catalog.tier_names`."""
        async with self._reading() as connection:
            names = (await connection.execute(select(tiers.c.name))).scalars().all()
        # Not ordered by the database: each collates in its own way.
        return sorted(names)

    async def anonymous_tier(self) -> str | None:
        """See `Catalog.anonymous_tier`."""
        async with self._reading() as connection:
            name: str | None = (await connection.execute(select(policy_state.c.anonymous_tier))).scalar()
        return name

    async def version(self) -> int:
        """See `Catalog.version`."""
        async with self._reading() as connection:
            return int((await connection.execute(select(policy_state.c.version))).scalar_one())

    async def ping(self) -> None:
        """See `Catalog.ping`."""
        await self.version()

    async def close(self) -> None:
        """See `Catalog.close`."""
        await self._engine.dispose()

    async def list_tiers(self) -> list[Tier]:
        """All tiers with their rules, by name.

        Returns:
            The tiers.

        Raises:
            CatalogUnavailable: if the database does not answer.
        """
        async with self._reading() as connection:
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
            query = query.where(tiers.c.name == tier)
        if after is not None:
            query = query.where(api_keys.c.id > after)
        async with self._reading() as connection:
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
        async with self._changing() as connection:
            row = (await connection.execute(select(tiers).where(tiers.c.name == tier))).mappings().first()
            if row is None:
                names = (await connection.execute(select(tiers.c.name).order_by(tiers.c.name))).scalars().all()
                raise CatalogError(f"there is no tier {tier!r}: there are {', '.join(names) or 'none yet; apply a policy first'}")
            api_key = make_api_key()
            record = ApiKey(hash_api_key(api_key), tier, name=name, expires_at_us=expires_at_us)
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
        async with self._changing() as connection:
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
        async with self._reading() as connection:
            if (await connection.execute(select(policy_state.c.file_digest))).scalar() == digest:
                return False
        async with self._changing() as connection:
            # Another instance may have applied the same file while this one waited for its turn.
            if (await connection.execute(select(policy_state.c.file_digest))).scalar() == digest:
                await connection.rollback()
                return False
            await _apply_tiers(connection, policy)
            await _apply_keys(connection, policy)
            await _drop_tiers(connection, policy)
            await connection.execute(update(policy_state).values(anonymous_tier=policy.anonymous_tier, file_digest=digest))
        return True

    @contextlib.asynccontextmanager
    async def _reading(self) -> AsyncIterator[AsyncConnection]:
        try:
            async with self._engine.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise CatalogUnavailable(f"the catalog's database does not answer: {_reason(error)}") from error

    @contextlib.asynccontextmanager
    async def _changing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that raises the version; it takes the one row of the state first, and so its turn among all writers."""
        try:
            async with self._engine.begin() as connection:
                await connection.execute(update(policy_state).values(version=policy_state.c.version + 1, changed_at_us=_now_us()))
                yield connection
        except SQLAlchemyError as error:
            raise CatalogUnavailable(f"the catalog's database did not take the change: {_reason(error)}") from error


async def _apply_tiers(connection: AsyncConnection, policy: Policy) -> None:
    held = {row["name"]: row for row in (await connection.execute(select(tiers))).mappings()}
    for tier in policy.tiers:
        row = held.get(tier.name)
        if row is not None and not row["managed_by_file"]:
            raise CatalogError(f"tier {tier.name!r} of the policy file was made otherwise: rename one of the two")
        values = policy_rows.row_of_tier(tier)
        if row is None:
            tier_id = (await connection.execute(insert(tiers).values(values).returning(tiers.c.id))).scalar_one()
        else:
            tier_id = row["id"]
            await connection.execute(update(tiers).where(tiers.c.id == tier_id).values(values))
        await _apply_rules(connection, tier, tier_id)


async def _apply_rules(connection: AsyncConnection, tier: Tier, tier_id: int) -> None:
    rows = (await connection.execute(select(rate_limit_rules).where(rate_limit_rules.c.tier_id == tier_id))).mappings().all()
    held = {row["name"]: row for row in rows}
    wanted = {rule.name: policy_rows.row_of_rule(rule, tier_id, position) for position, rule in enumerate(tier.rules)}
    for name, row in held.items():
        if name in wanted and not row["managed_by_file"]:
            raise CatalogError(
                f"rule {name!r} of tier {tier.name!r} in the policy file was made otherwise: rename one of the two"
            )
        if name not in wanted and row["managed_by_file"]:
            await connection.execute(delete(rate_limit_rules).where(rate_limit_rules.c.id == row["id"]))
    made = []
    for name, values in wanted.items():
        kept = held.get(name)
        if kept is None:
            made.append(values)
        elif any(kept[column] != value for column, value in values.items()):
            await connection.execute(update(rate_limit_rules).where(rate_limit_rules.c.id == kept["id"]).values(values))
    if made:
        await connection.execute(insert(rate_limit_rules), made)


async def _apply_keys(connection: AsyncConnection, policy: Policy) -> None:
    tier_ids = {row.name: row.id for row in await connection.execute(select(tiers.c.id, tiers.c.name))}
    wanted = {api_key.sha256: api_key for api_key in policy.api_keys}
    owned = {
        row["sha256"]: row for row in (await connection.execute(select(api_keys).where(api_keys.c.managed_by_file))).mappings()
    }
    for sha256, row in owned.items():
        if sha256 not in wanted:
            await connection.execute(delete(api_keys).where(api_keys.c.id == row["id"]))
    made: list[dict[str, Any]] = []
    for sha256, api_key in wanted.items():
        kept = owned.get(sha256)
        values = policy_rows.row_of_api_key(api_key, tier_ids[api_key.tier], _now_us())
        if kept is None:
            foreign = (await connection.execute(select(api_keys.c.id).where(api_keys.c.sha256 == sha256))).scalar()
            if foreign is not None:
                raise CatalogError(f"the API key {foreign} of the policy file was made otherwise: remove it from the file")
            made.append(values)
        else:
            del values["created_at_us"]
            await connection.execute(update(api_keys).where(api_keys.c.id == kept["id"]).values(values))
    if made:
        await connection.execute(insert(api_keys), made)


async def _drop_tiers(connection: AsyncConnection, policy: Policy) -> None:
    kept = {tier.name for tier in policy.tiers}
    for row in (await connection.execute(select(tiers).where(tiers.c.managed_by_file))).mappings().all():
        if row["name"] in kept:
            continue
        user = (await connection.execute(select(api_keys.c.id).where(api_keys.c.tier_id == row["id"]).limit(1))).scalar()
        if user is not None:
            raise CatalogError(
                f"tier {row['name']!r} is gone from the policy file, but API keys made otherwise still use it, such as {user}: "
                "keep the tier, or revoke and replace those keys first"
            )
        await connection.execute(delete(tiers).where(tiers.c.id == row["id"]))


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


def _now_us() -> int:
    return time.time_ns() // 1000


def _reason(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]
