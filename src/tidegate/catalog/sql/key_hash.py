"""Whether the API keys of a catalog were hashed in the way that the settings say: if not, every key would be unknown."""

from __future__ import annotations

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tidegate.catalog.sql.database import Database
from tidegate.catalog.sql.tables import api_keys, policy_state
from tidegate.errors import SettingsError
from tidegate.policy.key_hash import SHA256, KeyHash


async def key_hash_fault(connection: AsyncConnection, key_hash: KeyHash) -> str | None:
    """What is wrong with the settings for this catalog.

    Args:
        connection: reads the catalog.
        key_hash: as the settings say.

    Returns:
        A message; None if its keys were hashed like that, or it has no keys but those of the policy file, which is applied anew.
    """
    stored = await _stored(connection)
    if stored == key_hash.mark:
        return None
    own = select(api_keys.c.id).where(api_keys.c.managed_by_file.is_(False)).limit(1)
    if (await connection.execute(own)).scalar() is None:
        return None
    kind = stored.partition(":")[0] or SHA256
    if kind == key_hash.kind:
        return (
            "the API keys of this catalog were hashed with another keys.pepper: none would be accepted; set the previous pepper"
        )
    return (
        f"the API keys of this catalog were hashed with {kind}, and keys.hash is {key_hash.kind}: none would be accepted; set "
        f'keys.hash = "{kind}" again, or delete these keys and import them anew (docs/customers.md)'
    )


async def settle_key_hash(database: Database, key_hash: KeyHash) -> None:
    """Require that the keys of a catalog were hashed in this way; note the way in a catalog without keys of its own.

    Args:
        key_hash: as the settings say.

    Raises:
        SettingsError: if they were hashed in another way.
        CatalogUnavailable: if the database does not answer.
    """
    async with database.reading() as connection:
        if await _stored(connection) == key_hash.mark:
            return
        fault = await key_hash_fault(connection, key_hash)
    if fault is not None:
        raise SettingsError(fault)
    async with database.transaction() as connection:
        await connection.execute(update(policy_state).values(key_hash=key_hash.mark or None))


async def _stored(connection: AsyncConnection) -> str:
    return (await connection.execute(select(policy_state.c.key_hash))).scalar() or ""
