"""Usage and reset of API keys by id; `tidegate.gate.usage` reads and resets the counters."""

from __future__ import annotations

from sqlalchemy import select

from tidegate.admin.lists import key_row
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import NotFound
from tidegate.catalog.cache_level import Caller
from tidegate.catalog.sql.tables import api_keys
from tidegate.decision import Usage, client_of
from tidegate.gate.gate import Gate
from tidegate.gate.usage import caller_usage, own_limits, reset_counters


async def caller_of(editor: CatalogEditor, gate: Gate, key_id: str) -> Caller:
    """The caller of an API key, including revoked and expired keys.

    Raises:
        NotFound: if there is no such key.
        CatalogUnavailable: if the catalog does not answer.
    """
    row = await key_row(editor, key_id)
    caller = await gate.catalog.caller(row["sha256"])
    if caller is None:
        raise NotFound(f"the API key {key_id} was deleted: see GET /admin/v1/api-keys")
    return caller


async def subject_of_key(editor: CatalogEditor, key_id: str) -> str:
    """The subject of a key in counters and violations: the first key of its chain of rotations.

    Returns:
        The subject; the key's own id if its record was deleted.

    Raises:
        CatalogUnavailable: if the catalog does not answer.
    """
    async with editor.reading() as connection:
        counts_as = (await connection.execute(select(api_keys.c.counts_as).where(api_keys.c.id == key_id))).scalar()
    return f"k:{counts_as or key_id}"


async def key_usage(editor: CatalogEditor, gate: Gate, key_id: str, ip: str | None) -> Usage:
    """The usage of an API key; unlike `Gate.usage` also for revoked and expired keys.

    Args:
        ip: address of the key's client, for rules that count by address; None to omit these.

    Raises:
        NotFound: if there is no such key.
        BadRequest: if the ip is not a valid address.
        CatalogUnavailable: if the catalog does not answer.
    """
    client = None if ip is None else client_of(ip)
    return await caller_usage(gate.counters, await caller_of(editor, gate, key_id), client)


async def reset_key(editor: CatalogEditor, gate: Gate, key_id: str) -> int:
    """Reset the counters of an API key.

    Returns:
        The number of counters reset.

    Raises:
        NotFound: if there is no such key.
        CatalogUnavailable: if the catalog does not answer.
        StoreUnavailable: if the counter store fails; some may have been reset.
    """
    caller = await caller_of(editor, gate, key_id)
    return await reset_counters(gate.counters, [(limits, caller.subject) for limits in own_limits(caller.tier)])
