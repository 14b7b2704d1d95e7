"""Imports a policy into the catalog, and exports the catalog as a policy.

An import creates or changes the rows that the policy names, and no others; with `prune` it also removes rows that the policy does
not name, but never rows of the policy file. It is one transaction: a policy that contradicts the file changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, TypeVar

import msgspec
from sqlalchemy import Column, func, insert, select, true, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tidegate.admin.api_keys import key_rows
from tidegate.admin.customers import customer_rows
from tidegate.admin.import_plan import CatalogRows, ImportPlan, plan_import
from tidegate.admin.models import JsonObject, Row
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import AuditedTransaction, rule_rows
from tidegate.catalog.sql import rows as policy_rows
from tidegate.catalog.sql.bulk import BATCH_SIZE, batches, delete_rows, insert_rows, update_rows
from tidegate.catalog.sql.customers import customer_ids, customer_of, write_customers
from tidegate.catalog.sql.namespace_rows import with_import
from tidegate.catalog.sql.override_rows import by_key, read_all_overrides, write_overrides
from tidegate.catalog.sql.tables import api_keys, customers, policy_state, rate_limit_rules, tiers
from tidegate.errors import CatalogError
from tidegate.policy.customers import Customer
from tidegate.policy.model import ApiKey, Policy, Tier
from tidegate.policy.overrides import active_overrides
from tidegate.policy.rules import Subject
from tidegate.policy.subject_overrides import OverrideFit
from tidegate.timestamps import now_us

MAX_KEYS: Final = 5_000
"""Maximum number of API keys in one policy, and of keys removed by one import: all of them are in memory."""
MAX_COMPARED_RULES: Final = 50_000
"""Maximum number of rules in the affected tiers that an import compares with a policy."""

_ATTEMPTS: Final = 3
_RULE_COLUMNS: Final = (*policy_rows.RULE_COLUMNS, "managed_by_file", "revision")
_KEY_COLUMNS: Final = (*policy_rows.KEY_COLUMNS, "revoked_at_us", "revoked_reason", "managed_by_file", "revision")


_Owner = TypeVar("_Owner", ApiKey, Customer)


class _Outdated(Exception):
    """The catalog was changed after it was compared with the policy."""


async def export_policy(editor: CatalogEditor, *, with_keys: bool = True) -> Policy:
    """Export the catalog as a policy, including rows of the policy file.

    Returns:
        The policy, without overrides that have no effect because their rule was deleted or does not count by API key.

    Raises:
        CatalogError: if there are more API keys than one policy may have.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.reading() as connection:
        keys: list[Any] = []
        if with_keys:
            count = (await connection.execute(select(func.count()).select_from(api_keys))).scalar_one()
            if count > MAX_KEYS:
                raise CatalogError(f"there are {count} API keys: an export has at most {MAX_KEYS}; use keys=false")
            keys = list((await connection.execute(key_rows().order_by(api_keys.c.id))).mappings())
        tier_rows = (await connection.execute(select(tiers).order_by(tiers.c.name))).mappings().all()
        rules: dict[int, list[Any]] = {}
        for row in (
            await connection.execute(rule_rows().order_by(rate_limit_rules.c.position, rate_limit_rules.c.id))
        ).mappings():
            rules.setdefault(row["tier_id"], []).append(row)
        overrides = await read_all_overrides(connection)
        customer_list = (await connection.execute(customer_rows().order_by(customers.c.name))).mappings().all()
        state = (await connection.execute(select(policy_state))).mappings().one()
    stored = [policy_rows.tier_of(row, rules.get(row["id"], ()), overrides.get(row["id"])) for row in tier_rows]
    exported = [_without_unused_subjects(tier) for tier in stored]
    overridable = {(tier.name, rule.name) for tier in exported for rule in tier.rules if rule.subject is Subject.API_KEY}
    by_customer = {(tier.name, rule.name) for tier in exported for rule in tier.rules if rule.subject is Subject.CUSTOMER}
    callers = policy_rows.caller_policy_of(state)
    return Policy(
        tuple(exported),
        tuple(_without_unused_overrides(policy_rows.api_key_of(row), overridable) for row in keys),
        callers.anonymous_tier,
        callers.attributes,
        callers.callers,
        callers.jwt,
        callers.namespaces,
        callers.access,
        tuple(
            _without_unused_overrides(customer_of(row, with_metadata=True), overridable | by_customer) for row in customer_list
        ),
        callers.notify,
    )


async def import_policy(
    editor: CatalogEditor, actor: str, policy: Policy, *, dry_run: bool = False, prune: bool = False
) -> list[JsonObject]:
    """Import a policy into the catalog.

    The changes are computed before the write lock is acquired, in a thread, and written in bulk; a dry run never acquires it.

    Args:
        dry_run: whether to return the changes only; the target of a new rule is its name then, because it has no id yet.
        prune: whether rows that neither the policy nor the policy file names are removed.

    Returns:
        The changes in the format of the audit log.

    Raises:
        ManagedByFile: if the policy contradicts the policy file.
        CatalogError: if a change is not possible.
        CatalogUnavailable: if the database does not answer.
    """
    if len(policy.api_keys) > MAX_KEYS:
        raise CatalogError(f"the policy has {len(policy.api_keys)} API keys: at most {MAX_KEYS} can be imported at once")
    for attempt in range(_ATTEMPTS):
        async with editor.reading() as connection:
            existing = await _read(connection, policy, prune=prune)
        plan = await asyncio.to_thread(plan_import, policy, existing, now_us(), prune=prune)
        if dry_run or not plan.changes:
            return plan.changes
        try:
            async with editor.changing(actor) as transaction:
                if transaction.previous != existing.version:
                    if attempt + 1 < _ATTEMPTS:
                        raise _Outdated
                    # The catalog is changed all the time: the last attempt compares under the write lock.
                    existing = await _read(transaction.connection, policy, prune=prune)
                    plan = await asyncio.to_thread(plan_import, policy, existing, now_us(), prune=prune)
                    if not plan.changes:
                        raise _Outdated
                await _write(transaction, plan, {name: row["id"] for name, row in existing.tiers.items()})
        except _Outdated:
            continue
        return plan.changes
    return []


async def _read(connection: AsyncConnection, policy: Policy, *, prune: bool) -> CatalogRows:
    """The catalog's rows that a policy names, read in pages, so that no statement runs long and no page blocks the event loop."""
    state = (await connection.execute(select(policy_state))).mappings().one()
    has_file = state["file_digest"] is not None
    of_tiers = true() if prune else tiers.c.name.in_([tier.name for tier in policy.tiers])
    existing = {row["name"]: row async for row in _pages(connection, select(tiers).where(of_tiers), tiers.c.id)}
    rules: dict[str, dict[str, Row]] = {}
    count = 0
    async for row in _pages(connection, rule_rows().where(of_tiers), rate_limit_rules.c.id):
        rules.setdefault(row["tier_name"], {})[row["name"]] = row
        count += 1
        if count > MAX_COMPARED_RULES:
            raise CatalogError(f"the affected tiers have more than {MAX_COMPARED_RULES} rules: import fewer tiers at once")
    keys: dict[str, Row] = {}
    digests = [api_key.sha256 for api_key in policy.api_keys]
    for begin in range(0, len(digests), BATCH_SIZE):
        named = key_rows().where(api_keys.c.sha256.in_(digests[begin : begin + BATCH_SIZE]))
        keys |= {row["sha256"]: row for row in (await connection.execute(named)).mappings()}
    if prune:
        # Without a policy file, operators own the rows that a former file created.
        unnamed = key_rows().where(~api_keys.c.managed_by_file) if has_file else key_rows()
        async for row in _pages(connection, unnamed, api_keys.c.id):
            keys[row["sha256"]] = row
            if len(keys) > len(digests) + MAX_KEYS:
                raise CatalogError(
                    f"more than {MAX_KEYS} API keys would be removed: name them in the policy, or import without prune"
                )
    owners = await _customers(connection, [customer.name for customer in policy.customers], prune=prune)
    stored = await read_all_overrides(connection)
    overrides = {name: by_key(stored.get(row["id"])) for name, row in existing.items()}
    caller_policy = policy_rows.caller_policy_of(state)
    return CatalogRows(int(state["version"]), caller_policy, has_file, existing, rules, keys, owners, overrides)


async def _customers(connection: AsyncConnection, names: list[str], *, prune: bool) -> dict[str, Row]:
    found: dict[str, Row] = {}
    if prune:
        async for row in _pages(connection, customer_rows(), customers.c.id):
            found[row["name"]] = row
        return found
    for batch in batches(names):
        rows = (await connection.execute(customer_rows().where(customers.c.name.in_(batch)))).mappings()
        found |= {row["name"]: row for row in rows}
    return found


async def _pages(connection: AsyncConnection, query: Any, order: Column[Any]) -> AsyncIterator[Any]:
    begin: Any = None
    while True:
        page = query if begin is None else query.where(order > begin)
        rows = (await connection.execute(page.order_by(order).limit(BATCH_SIZE))).mappings().all()
        for row in rows:
            yield row
        if len(rows) < BATCH_SIZE:
            return
        begin = rows[-1]["id"]


async def _write(transaction: AuditedTransaction, plan: ImportPlan, tier_ids: dict[str, int]) -> None:
    """Write a plan, many rows per statement, so that the write lock is released as soon as possible."""
    connection = transaction.connection
    rule_ids: dict[tuple[int, str], int] = {}
    for kind, name in plan.touched:
        transaction.touch(kind, name)
    for batch in batches(plan.tier_inserts):
        created = await connection.execute(insert(tiers).returning(tiers.c.id, tiers.c.name), batch)
        tier_ids |= {row.name: row.id for row in created}
    await update_rows(connection, tiers, plan.tier_updates, (*policy_rows.TIER_COLUMNS, "managed_by_file", "revision"))
    await update_rows(connection, rate_limit_rules, plan.rule_updates, _RULE_COLUMNS)
    for batch in batches([{**each.values, "tier_id": tier_ids[each.tier]} for each in plan.rule_inserts]):
        of_rule = rate_limit_rules.c
        created = await connection.execute(insert(rate_limit_rules).returning(of_rule.tier_id, of_rule.name, of_rule.id), batch)
        rule_ids |= {(row.tier_id, row.name): row.id for row in created}
    for each in plan.rule_inserts:
        # Found by name: a bulk insert does not return rows in the order of insertion.
        rule_id = rule_ids[tier_ids[each.tier], each.values["name"]]
        each.change["target"] = str(rule_id)
        each.change["after"]["id"] = rule_id
    await delete_rows(connection, rate_limit_rules, plan.rule_deletes)
    for name, entries in plan.overrides.items():
        await write_overrides(connection, tier_ids[name], entries)
    inserted = [_with_tier_id(values, tier_ids) for values in plan.customer_inserts]
    changed = [(row, _with_tier_id(values, tier_ids)) for row, values in plan.customer_updates]
    await write_customers(transaction, inserted, changed, [])
    names = {str(row["customer_name"]) for row in (*plan.key_inserts, *plan.key_updates) if row["customer_name"] is not None}
    owner_ids = await customer_ids(connection, names)
    await insert_rows(connection, api_keys, [_with_ids(values, tier_ids, owner_ids) for values in plan.key_inserts])
    await update_rows(connection, api_keys, [_with_ids(row, tier_ids, owner_ids) for row in plan.key_updates], _KEY_COLUMNS)
    await delete_rows(connection, api_keys, plan.key_deletes)
    if plan.customer_deletes:
        await write_customers(transaction, [], [], plan.customer_deletes)
    if plan.caller_policy is not None:
        values = policy_rows.row_of_caller_policy(plan.caller_policy)
        stored = (await connection.execute(select(policy_state.c.namespaces))).scalar()
        values["namespaces"] = with_import(stored, plan.caller_policy.namespaces)
        await connection.execute(update(policy_state).values(**values))
    await delete_rows(connection, tiers, plan.tier_deletes)
    await transaction.audit_all(plan.changes)


def _with_tier_id(row: Mapping[Any, Any], tier_ids: Mapping[str, int]) -> dict[str, Any]:
    values = dict(row)
    name = values.pop("tier_name")
    values["tier_id"] = None if name is None else tier_ids[name]
    return values


def _with_ids(row: Mapping[Any, Any], tier_ids: Mapping[str, int], owner_ids: Mapping[str, int]) -> dict[str, Any]:
    values = _with_tier_id(row, tier_ids)
    name = values.pop("customer_name")
    values["customer_id"] = None if name is None else owner_ids[name]
    return values


def _without_unused_subjects(tier: Tier) -> Tier:
    """A tier without overrides for subjects that have ended, or no longer fit their rule."""
    if not tier.overrides:
        return tier
    fit, now = OverrideFit(tier.rules), now_us()
    kept = tuple(each for each in tier.overrides if (each.until_us is None or each.until_us > now) and fit.holds(each))
    return msgspec.structs.replace(tier, overrides=kept)


def _without_unused_overrides(owner: _Owner, overridable: set[tuple[str, str]]) -> _Owner:
    """A key or customer without overrides that have ended, or whose rule is gone or counts something else."""
    lasting = active_overrides(owner.overrides, now_us())
    kept = tuple(each for each in lasting if not each.rule or (owner.tier, each.rule) in overridable)
    return owner if kept == owner.overrides else msgspec.structs.replace(owner, overrides=kept)
