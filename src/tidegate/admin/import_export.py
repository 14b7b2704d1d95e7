"""A whole policy in and out of the catalog, by operators.

An import makes or changes the rows that the text names, and leaves all others alone; with `prune` it removes those that the text
does not name, but never a row of the policy file. It is one transaction: a text that contradicts the file changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from sqlalchemy import Column, func, insert, select, true, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tidegate.admin.api_keys import key_rows
from tidegate.admin.import_plan import HeldRows, ImportPlan, plan_import
from tidegate.admin.models import JsonObject, Row
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import AuditedTransaction, rule_rows
from tidegate.catalog.sql import rows as policy_rows
from tidegate.catalog.sql.bulk import BATCH_SIZE, batches, delete_rows, insert_rows, update_rows
from tidegate.catalog.sql.tables import api_keys, policy_state, rate_limit_rules, tiers
from tidegate.errors import CatalogError
from tidegate.policy.model import ApiKey, Policy, Subject
from tidegate.timestamps import now_us

MAX_KEYS: Final = 5_000
"""Most API keys that one text takes, and that one import removes: they are read as a whole."""
MAX_HELD_RULES: Final = 50_000
"""Most rules of the tiers concerned that an import compares a text with."""

_ATTEMPTS: Final = 3
_RULE_COLUMNS: Final = (
    "endpoint_pattern",
    "methods",
    "algorithm",
    "limits",
    "subject",
    "priority",
    "mode",
    "on_failure",
    "managed_by_file",
    "revision",
)
_KEY_COLUMNS: Final = (
    "tier_id",
    "name",
    "status",
    "expires_at_us",
    "overrides",
    "revoked_at_us",
    "revoked_reason",
    "managed_by_file",
    "revision",
)


class _Outdated(Exception):
    """The catalog was changed since it was compared with the policy."""


async def export_policy(editor: CatalogEditor, *, with_keys: bool = True) -> Policy:
    """Everything that the catalog holds, rows of the policy file too.

    Args:
        editor: of the catalog.
        with_keys: whether API keys are in it.

    Returns:
        The policy. What a key overrides of a rule that is gone, or that counts by something else, is left out: it has no effect.

    Raises:
        CatalogError: if there are more API keys than a text takes.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.reading() as connection:
        keys: list[Any] = []
        if with_keys:
            count = (await connection.execute(select(func.count()).select_from(api_keys))).scalar_one()
            if count > MAX_KEYS:
                raise CatalogError(f"there are {count} API keys: more than {MAX_KEYS} fit no file; ask with keys=false")
            keys = list((await connection.execute(key_rows().order_by(api_keys.c.id))).mappings())
        tier_rows = (await connection.execute(select(tiers).order_by(tiers.c.name))).mappings().all()
        rules: dict[int, list[Any]] = {}
        for row in (
            await connection.execute(rule_rows().order_by(rate_limit_rules.c.position, rate_limit_rules.c.id))
        ).mappings():
            rules.setdefault(row["tier_id"], []).append(row)
        anonymous = (await connection.execute(select(policy_state.c.anonymous_tier))).scalar()
    held = [policy_rows.tier_of(row, rules.get(row["id"], ())) for row in tier_rows]
    overridable = {(tier.name, rule.name) for tier in held for rule in tier.rules if rule.subject is Subject.API_KEY}
    return Policy(tuple(held), tuple(_without_idle(policy_rows.api_key_of(row), overridable) for row in keys), anonymous)


async def import_policy(
    editor: CatalogEditor, actor: str, policy: Policy, *, dry_run: bool = False, prune: bool = False
) -> list[JsonObject]:
    """Take a policy into the catalog.

    The changes are worked out before the write lock is taken, in a thread, and written in bulk; a dry run never takes it.

    Args:
        editor: of the catalog.
        actor: who asks.
        policy: the policy.
        dry_run: whether the changes are only to be shown; a rule to be made has no id yet, its target is its name.
        prune: whether rows that neither the policy nor the policy file names are removed.

    Returns:
        The changes, each as the audit log tells it.

    Raises:
        ManagedByFile: if the policy says something else than the policy file does.
        CatalogError: if a change is refused.
        CatalogUnavailable: if the database does not answer.
    """
    if len(policy.api_keys) > MAX_KEYS:
        raise CatalogError(f"the policy has {len(policy.api_keys)} API keys: at most {MAX_KEYS} are taken at once")
    for attempt in range(_ATTEMPTS):
        async with editor.reading() as connection:
            held = await _read(connection, policy, prune=prune)
        plan = await asyncio.to_thread(plan_import, policy, held, now_us(), prune=prune)
        if dry_run or not plan.changes:
            return plan.changes
        try:
            async with editor.changing(actor) as transaction:
                if transaction.previous != held.version:
                    if attempt + 1 < _ATTEMPTS:
                        raise _Outdated
                    # Others change the catalog all the time: the last attempt holds them up meanwhile.
                    held = await _read(transaction.connection, policy, prune=prune)
                    plan = await asyncio.to_thread(plan_import, policy, held, now_us(), prune=prune)
                    if not plan.changes:
                        raise _Outdated
                await _write(transaction, plan, {name: row["id"] for name, row in held.tiers.items()})
        except _Outdated:
            continue
        return plan.changes
    return []


async def _read(connection: AsyncConnection, policy: Policy, *, prune: bool) -> HeldRows:
    """What the catalog holds of what a policy names, in pages: no statement and no turn of the event loop takes long."""
    columns = (policy_state.c.version, policy_state.c.anonymous_tier, policy_state.c.file_digest)
    state = (await connection.execute(select(*columns))).one()
    has_file = state.file_digest is not None
    of_tiers = true() if prune else tiers.c.name.in_([tier.name for tier in policy.tiers])
    held = {row["name"]: row async for row in _pages(connection, select(tiers).where(of_tiers), tiers.c.id)}
    rules: dict[str, dict[str, Row]] = {}
    count = 0
    async for row in _pages(connection, rule_rows().where(of_tiers), rate_limit_rules.c.id):
        rules.setdefault(row["tier_name"], {})[row["name"]] = row
        count += 1
        if count > MAX_HELD_RULES:
            raise CatalogError(f"the tiers concerned have more than {MAX_HELD_RULES} rules: import fewer tiers at once")
    keys: dict[str, Row] = {}
    digests = [api_key.sha256 for api_key in policy.api_keys]
    for begin in range(0, len(digests), BATCH_SIZE):
        named = key_rows().where(api_keys.c.sha256.in_(digests[begin : begin + BATCH_SIZE]))
        keys |= {row["sha256"]: row for row in (await connection.execute(named)).mappings()}
    if prune:
        # Without a file, rows that one made are the operators' own.
        unnamed = key_rows().where(~api_keys.c.managed_by_file) if has_file else key_rows()
        async for row in _pages(connection, unnamed, api_keys.c.id):
            keys[row["sha256"]] = row
            if len(keys) > len(digests) + MAX_KEYS:
                raise CatalogError(f"more than {MAX_KEYS} API keys would be removed: name them in the text, or leave out prune")
    return HeldRows(int(state.version), state.anonymous_tier, has_file, held, rules, keys)


async def _pages(connection: AsyncConnection, query: Any, place: Column[Any]) -> AsyncIterator[Any]:
    begin: Any = None
    while True:
        page = query if begin is None else query.where(place > begin)
        rows = (await connection.execute(page.order_by(place).limit(BATCH_SIZE))).mappings().all()
        for row in rows:
            yield row
        if len(rows) < BATCH_SIZE:
            return
        begin = rows[-1]["id"]


async def _write(transaction: AuditedTransaction, plan: ImportPlan, tier_ids: dict[str, int]) -> None:
    """Write a plan, many rows a statement: the write lock is held no longer than the database needs."""
    connection = transaction.connection
    rule_ids: dict[tuple[int, str], int] = {}
    for kind, name in plan.touched:
        transaction.touch(kind, name)
    for batch in batches(plan.tier_inserts):
        made = await connection.execute(insert(tiers).returning(tiers.c.id, tiers.c.name), batch)
        tier_ids |= {row.name: row.id for row in made}
    await update_rows(connection, tiers, plan.tier_updates, ("limits", "managed_by_file", "revision"))
    await update_rows(connection, rate_limit_rules, plan.rule_updates, _RULE_COLUMNS)
    for batch in batches([{**each.values, "tier_id": tier_ids[each.tier]} for each in plan.rule_inserts]):
        of_rule = rate_limit_rules.c
        made = await connection.execute(insert(rate_limit_rules).returning(of_rule.tier_id, of_rule.name, of_rule.id), batch)
        rule_ids |= {(row.tier_id, row.name): row.id for row in made}
    for each in plan.rule_inserts:
        # Found by name: rows come back in the order of the insert only if each is a statement of its own.
        rule_id = rule_ids[tier_ids[each.tier], each.values["name"]]
        each.change["target"] = str(rule_id)
        each.change["after"]["id"] = rule_id
    await delete_rows(connection, rate_limit_rules, plan.rule_deletes)
    await insert_rows(connection, api_keys, [_with_tier_id(values, tier_ids) for values in plan.key_inserts])
    await update_rows(connection, api_keys, [_with_tier_id(row, tier_ids) for row in plan.key_updates], _KEY_COLUMNS)
    await delete_rows(connection, api_keys, plan.key_deletes)
    if plan.anonymous_tier is not None:
        await connection.execute(update(policy_state).values(anonymous_tier=plan.anonymous_tier))
    await delete_rows(connection, tiers, plan.tier_deletes)
    await transaction.audit_all(plan.changes)


def _with_tier_id(row: Mapping[Any, Any], tier_ids: Mapping[str, int]) -> dict[str, Any]:
    values = dict(row)
    values["tier_id"] = tier_ids[values.pop("tier_name")]
    return values


def _without_idle(api_key: ApiKey, overridable: set[tuple[str, str]]) -> ApiKey:
    kept = tuple(each for each in api_key.overrides if not each.rule or (api_key.tier, each.rule) in overridable)
    if len(kept) == len(api_key.overrides):
        return api_key
    return ApiKey(
        api_key.sha256, api_key.tier, api_key.status, api_key.name, api_key.expires_at_us, kept, api_key.managed_by_file
    )
