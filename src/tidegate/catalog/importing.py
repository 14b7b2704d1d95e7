"""A whole policy in and out of the catalog, by operators.

An import makes or changes the rows that the text names, and leaves all others alone; with `prune` it removes those that the text
does not name, but never a row of the policy file. It is one transaction: a text that contradicts the file changes nothing.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import delete, func, select, update

from tidegate.catalog import policy_rows
from tidegate.catalog.changes import ANONYMOUS, KEY, TIER
from tidegate.catalog.changing import (
    Change,
    ManagedByFile,
    held_tier,
    insert_rule,
    insert_tier,
    now_us,
    remove_rule,
    rule_rows,
    update_rule,
    update_tier,
)
from tidegate.catalog.editing import CatalogEditor
from tidegate.catalog.editing_keys import insert_foreign_key, key_rows, update_key
from tidegate.catalog.forms import Form, key_form, tier_form
from tidegate.catalog.tables import api_keys, policy_state, rate_limit_rules, tiers
from tidegate.errors import CatalogError
from tidegate.policy import ApiKey, KeyStatus, Policy, Subject, Tier

MAX_KEYS: Final = 5_000
"""Most API keys that one text takes: it is read as a whole."""


class _Recorded(Change):
    """A change that also keeps what it did, to be shown."""

    def __init__(self, change: Change) -> None:
        super().__init__(change.writing, change.actor, change.has_file)
        self.changes: list[Form] = []

    async def audit(self, action: str, kind: str, target: str, before: Form | None, after: Form | None) -> None:
        await super().audit(action, kind, target, before, after)
        self.changes.append({"action": action, "kind": kind, "target": target, "before": before, "after": after})


class _DryRun(Exception):
    """Takes a transaction back that was only to be looked at."""


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
) -> list[Form]:
    """Take a policy into the catalog.

    Args:
        editor: of the catalog.
        actor: who asks.
        policy: the policy.
        dry_run: whether the changes are only to be shown.
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
    changes: list[Form] = []
    try:
        async with editor.changing(actor) as change:
            recorded = _Recorded(change)
            for tier in policy.tiers:
                await _take_tier(recorded, tier, prune=prune)
            await _take_keys(recorded, policy, prune=prune)
            await _take_anonymous(recorded, policy.anonymous_tier)
            if prune:
                await _prune_tiers(recorded, {tier.name for tier in policy.tiers})
            changes = recorded.changes
            if dry_run or not changes:
                raise _DryRun
    except _DryRun:
        return changes
    return changes


def import_warnings(text: str, changes: Sequence[Form]) -> list[str]:
    """What may not have been meant by an import, beside what `policy_warnings` says of its policy.

    Args:
        text: the valid policy that was imported.
        changes: that it made.

    Returns:
        One sentence where API keys came in by their digests: of a digest nobody can tell whether its key has a form that is
        looked up at all.
    """
    tables = tomllib.loads(text.removeprefix("\ufeff")).get("api_keys", [])
    by_digest = {str(table["sha256"]).lower()[:24] for table in tables if "sha256" in table}
    made = {change["target"] for change in changes if (change["action"], change["kind"]) == ("create", "api_key")}
    if not by_digest & made:
        return []
    return [
        f"{len(by_digest & made)} API keys came by their digests: they match only if the keys themselves have 16 to 128 of "
        "letters, digits, '_' and '-', and begin with 'tg_' only where Tidegate made them; any other key is refused before it is "
        "looked up"
    ]


async def _take_tier(change: Change, tier: Tier, *, prune: bool) -> None:
    row = await change.one(select(tiers).where(tiers.c.name == tier.name))
    if row is None:
        await insert_tier(change, tier)
        row = await held_tier(change, tier.name)
    elif policy_rows.row_of_tier(tier)["limits"] != row["limits"]:
        _require_own(change, row, f"tier {tier.name!r}")
        await update_tier(change, row, tier)
    held = {
        rule["name"]: rule for rule in (await change.connection.execute(rule_rows().where(tiers.c.id == row["id"]))).mappings()
    }
    for rule in tier.rules:
        kept = held.pop(rule.name, None)
        if kept is None:
            await insert_rule(change, row, rule)
            continue
        values = policy_rows.row_of_rule(rule, row["id"], kept["position"])
        if any(kept[column] != value for column, value in values.items() if column != "managed_by_file"):
            _require_own(change, kept, f"rule {rule.name!r} of tier {tier.name!r}")
            await update_rule(change, kept, rule)
    if prune:
        for kept in held.values():
            if not change.is_of_file(kept):
                await remove_rule(change, kept)


async def _take_keys(change: Change, policy: Policy, *, prune: bool) -> None:
    held = {row["sha256"]: row for row in (await change.connection.execute(key_rows())).mappings()} if prune else {}
    for api_key in policy.api_keys:
        row = held.pop(api_key.sha256, None) if prune else await change.one(key_rows().where(api_keys.c.sha256 == api_key.sha256))
        if row is None:
            await insert_foreign_key(change, api_key)
            continue
        tier = await held_tier(change, api_key.tier)
        values = policy_rows.row_of_api_key(api_key, tier["id"], row["created_at_us"])
        changed = {column: value for column, value in values.items() if column != "managed_by_file" and row[column] != value}
        if not changed:
            continue
        _require_own(change, row, f"the API key {row['id']}")
        if "status" in changed:
            over = api_key.status is KeyStatus.REVOKED
            changed |= {"revoked_at_us": now_us() if over else None, "revoked_reason": "by import of a policy" if over else None}
        await update_key(change, row, changed, "update", tier["name"])
    for row in held.values():
        if not change.is_of_file(row):
            change.touch(KEY, row["sha256"])
            await change.connection.execute(delete(api_keys).where(api_keys.c.id == row["id"]))
            await change.audit("delete", "api_key", row["id"], key_form(row), None)


async def _take_anonymous(change: Change, name: str | None) -> None:
    """Without [anonymous] in the text, what holds stays: a text may be about one tier only."""
    state = await change.one(select(policy_state.c.anonymous_tier, policy_state.c.file_digest))
    assert state is not None, "the migration makes its row"
    if name is None or state["anonymous_tier"] == name:
        return
    if state["file_digest"] is not None:
        raise ManagedByFile(f"the anonymous tier is {state['anonymous_tier']!r} by the policy file: change it there")
    change.touch(ANONYMOUS)
    await change.connection.execute(update(policy_state).values(anonymous_tier=name))
    await change.audit("update", "anonymous_tier", name, {"tier": state["anonymous_tier"]}, {"tier": name})


async def _prune_tiers(change: Change, named: set[str]) -> None:
    state = await change.one(select(policy_state.c.anonymous_tier))
    for row in (await change.connection.execute(select(tiers))).mappings().all():
        if row["name"] in named or change.is_of_file(row):
            continue
        if state is not None and state["anonymous_tier"] == row["name"]:
            raise CatalogError(f"tier {row['name']!r} is the anonymous tier: name another one in [anonymous] of the policy")
        for rule in (await change.connection.execute(rule_rows().where(tiers.c.id == row["id"]))).mappings().all():
            await remove_rule(change, rule)
        change.touch(TIER, row["name"])
        await change.connection.execute(delete(tiers).where(tiers.c.id == row["id"]))
        await change.audit("delete", "tier", row["name"], tier_form(row), None)


def _require_own(change: Change, row: Mapping[Any, Any], what: str) -> None:
    if change.is_of_file(row):
        raise ManagedByFile(f"{what} stands otherwise in the policy file: change it there, or take it out of this text")


def _without_idle(api_key: ApiKey, overridable: set[tuple[str, str]]) -> ApiKey:
    kept = tuple(each for each in api_key.overrides if not each.rule or (api_key.tier, each.rule) in overridable)
    if len(kept) == len(api_key.overrides):
        return api_key
    return ApiKey(
        api_key.sha256, api_key.tier, api_key.status, api_key.name, api_key.expires_at_us, kept, api_key.managed_by_file
    )
