"""Applies the policy file to the catalog: the rows that it owns are updated to match it, other rows are not changed."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tidegate.catalog.changes import ANONYMOUS, KEY, NONE, TIER
from tidegate.catalog.sql import rows as policy_rows
from tidegate.catalog.sql.bulk import batches, delete_rows, insert_rows, update_rows
from tidegate.catalog.sql.change_log import WriteTransaction
from tidegate.catalog.sql.customers import apply_customers, customer_ids, drop_customers
from tidegate.catalog.sql.namespace_rows import with_file
from tidegate.catalog.sql.override_rows import overrides_after_file, read_overrides, write_overrides
from tidegate.catalog.sql.tables import api_keys, audit_log, customers, policy_state, rate_limit_rules, tiers
from tidegate.errors import CatalogError
from tidegate.policy.model import Policy, Tier
from tidegate.timestamps import now_us

_RULE_COLUMNS: Final = (*policy_rows.RULE_COLUMNS, "position", "revision")
_KEY_COLUMNS: Final = (*policy_rows.KEY_COLUMNS, "revision")
_NOT_OWNED: Final = "belongs to the catalog, where it was created or last changed"


class Released(msgspec.Struct, frozen=True):
    """Counts of the rows released from a policy file.

    Args:
        tiers: without those that the file did not create.
    """

    tiers: int
    api_keys: int
    digest: str


async def release_file(writing: WriteTransaction, actor: str) -> Released | None:
    """Release the rows of the policy file, so that operators can change them. A file that is configured later owns those again
    that were not changed in the meantime.

    Returns:
        What was released; None if no file is active.
    """
    connection = writing.connection
    digest = (await connection.execute(select(policy_state.c.file_digest))).scalar()
    if digest is None:
        return None
    writing.touch(NONE)
    counts = [
        (await connection.execute(select(func.count()).select_from(table).where(table.c.managed_by_file))).scalar_one()
        for table in (tiers, api_keys)
    ]
    await connection.execute(update(policy_state).values(file_digest=None))
    released = Released(counts[0], counts[1], digest)
    row = {"at_us": now_us(), "actor": actor, "action": "release", "kind": "policy_file", "target": digest[:12]}
    await connection.execute(
        insert(audit_log).values(**row, before=None, after={"tiers": released.tiers, "api_keys": released.api_keys})
    )
    return released


async def apply_file(writing: WriteTransaction, policy: Policy, digest: str) -> None:
    """Update the rows that the policy file owns to match it.

    Raises:
        CatalogError: if the file contradicts rows that it does not own; the transaction must be rolled back then.
    """
    writing.touch(ANONYMOUS)
    await _apply_tiers(writing, policy)
    await apply_customers(writing, policy.customers, _NOT_OWNED)
    await _apply_keys(writing, policy)
    await drop_customers(writing, policy.customers)
    await _drop_tiers(writing, policy)
    values = policy_rows.row_of_caller_policy(policy.caller_policy)
    stored = (await writing.connection.execute(select(policy_state.c.namespaces))).scalar()
    values["namespaces"] = with_file(stored, policy.namespaces)
    await writing.connection.execute(update(policy_state).values(**values, file_digest=digest))


async def _apply_tiers(writing: WriteTransaction, policy: Policy) -> None:
    connection = writing.connection
    existing = {row["name"]: row for row in (await connection.execute(select(tiers))).mappings()}
    for tier in policy.tiers:
        row = existing.get(tier.name)
        if row is not None and not row["managed_by_file"]:
            raise CatalogError(f"tier {tier.name!r} of the policy file {_NOT_OWNED}: rename one of the two, or delete the other")
        writing.touch(TIER, tier.name)
        values = policy_rows.row_of_tier(tier)
        if row is None:
            tier_id = (await connection.execute(insert(tiers).values(values).returning(tiers.c.id))).scalar_one()
        else:
            tier_id = row["id"]
            if any(row[column] != value for column, value in values.items()):
                values["revision"] = row["revision"] + 1
                await connection.execute(update(tiers).where(tiers.c.id == tier_id).values(values))
        await _apply_rules(writing, tier, tier_id)
        entries = await read_overrides(connection, tier_id)
        kept = overrides_after_file(entries, tier.overrides, tier.name)
        if kept != entries:
            await write_overrides(connection, tier_id, kept)


async def _apply_rules(writing: WriteTransaction, tier: Tier, tier_id: int) -> None:
    connection = writing.connection
    rows = (await connection.execute(select(rate_limit_rules).where(rate_limit_rules.c.tier_id == tier_id))).mappings().all()
    existing = {row["name"]: row for row in rows}
    desired = {rule.name: policy_rows.row_of_rule(rule, tier_id, position) for position, rule in enumerate(tier.rules)}
    for name, row in existing.items():
        if name in desired and not row["managed_by_file"]:
            raise CatalogError(
                f"rule {name!r} of tier {tier.name!r} in the policy file {_NOT_OWNED}: rename one of the two, or delete the other"
            )
    removed = [row["id"] for name, row in existing.items() if name not in desired and row["managed_by_file"]]
    await delete_rows(connection, rate_limit_rules, removed)
    inserted: list[dict[str, Any]] = []
    changed: list[dict[str, Any]] = []
    for name, values in desired.items():
        current = existing.get(name)
        if current is None:
            inserted.append(values)
        elif any(current[column] != value for column, value in values.items()):
            changed.append({**values, "id": current["id"], "revision": current["revision"] + 1})
    # A rule inserted before others moves them all: one line of the file may change thousands of rows.
    await update_rows(connection, rate_limit_rules, changed, _RULE_COLUMNS)
    await insert_rows(connection, rate_limit_rules, inserted)


async def _apply_keys(writing: WriteTransaction, policy: Policy) -> None:
    connection = writing.connection
    tier_ids = {row.name: row.id for row in await connection.execute(select(tiers.c.id, tiers.c.name))}
    ids_of_customers = await customer_ids(connection, {api_key.customer for api_key in policy.api_keys if api_key.customer})
    desired = {api_key.sha256: api_key for api_key in policy.api_keys}
    owned = {
        row["sha256"]: row for row in (await connection.execute(select(api_keys).where(api_keys.c.managed_by_file))).mappings()
    }
    removed = {sha256: row["id"] for sha256, row in owned.items() if sha256 not in desired}
    for sha256 in removed:
        writing.touch(KEY, sha256)
    await delete_rows(connection, api_keys, list(removed.values()))
    await _require_unclaimed(connection, [sha256 for sha256 in desired if sha256 not in owned])
    inserted: list[dict[str, Any]] = []
    changed: list[dict[str, Any]] = []
    for sha256, api_key in desired.items():
        row = owned.get(sha256)
        customer_id = ids_of_customers[api_key.customer] if api_key.customer else None
        values = policy_rows.row_of_api_key(api_key, tier_ids[api_key.tier], now_us(), customer_id)
        if row is None:
            writing.touch(KEY, sha256)
            inserted.append(values)
            continue
        del values["created_at_us"]
        if any(row[column] != value for column, value in values.items()):
            writing.touch(KEY, sha256)
            changed.append({**values, "id": row["id"], "revision": row["revision"] + 1})
    await update_rows(connection, api_keys, changed, _KEY_COLUMNS)
    await insert_rows(connection, api_keys, inserted)


async def _require_unclaimed(connection: AsyncConnection, digests: list[str]) -> None:
    for batch in batches(digests):
        foreign = (await connection.execute(select(api_keys.c.id).where(api_keys.c.sha256.in_(batch)).limit(1))).scalar()
        if foreign is not None:
            raise CatalogError(f"the API key {foreign} of the policy file {_NOT_OWNED}: remove it from the file")


async def _drop_tiers(writing: WriteTransaction, policy: Policy) -> None:
    connection = writing.connection
    kept = {tier.name for tier in policy.tiers}
    for row in (await connection.execute(select(tiers).where(tiers.c.managed_by_file))).mappings().all():
        if row["name"] in kept:
            continue
        user = (await connection.execute(select(api_keys.c.id).where(api_keys.c.tier_id == row["id"]).limit(1))).scalar()
        if user is not None:
            raise CatalogError(
                f"tier {row['name']!r} was removed from the policy file, but other API keys still use it, e.g. {user}: "
                "keep the tier, or revoke and replace those keys first"
            )
        customer = (await connection.execute(select(customers.c.name).where(customers.c.tier_id == row["id"]).limit(1))).scalar()
        if customer is not None:
            raise CatalogError(
                f"tier {row['name']!r} was removed from the policy file, but is still the tier of the customer {customer!r}: "
                "keep the tier, or give that customer another one first"
            )
        others = select(rate_limit_rules.c.id, rate_limit_rules.c.name).where(
            rate_limit_rules.c.tier_id == row["id"], ~rate_limit_rules.c.managed_by_file
        )
        other = (await connection.execute(others.order_by(rate_limit_rules.c.id).limit(1))).first()
        if other is not None:
            raise CatalogError(
                f"tier {row['name']!r} was removed from the policy file, but still has other rules, e.g. "
                f"{other.name[:60]!r} with id {other.id}: keep the tier, or delete those rules first"
            )
        writing.touch(TIER, row["name"])
        await connection.execute(delete(tiers).where(tiers.c.id == row["id"]))
