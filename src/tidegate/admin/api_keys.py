"""Every change that operators make to API keys; see `editing`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import RowMapping, delete, insert, select, update

from tidegate.admin.records import Form, key_form
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import AuditedTransaction, NotThere, Seen, load_tier_row, require_editable
from tidegate.catalog.changes import KEY
from tidegate.catalog.sql import rows as policy_rows
from tidegate.catalog.sql.tables import api_keys, rate_limit_rules, tiers
from tidegate.errors import BadRequest, CatalogError, PolicyError
from tidegate.policy.key_format import hash_api_key, make_api_key
from tidegate.policy.labels import require_label
from tidegate.policy.limits import Algorithm, Limit, fit_limits
from tidegate.policy.model import ApiKey, KeyStatus, Override, Subject
from tidegate.timestamps import US_PER_S, now_us

_ID: Final = re.compile(r"[0-9a-f]{24}", re.ASCII)


class KeyFields(msgspec.Struct, frozen=True):
    """What can be said of an API key; what is UNSET stays as it is.

    Args:
        tier: name of its tier.
        name: a label for people, at most 200 characters.
        expires_at_us: µs since the epoch, None for never.
        limits: texts of limits that hold instead of the tier's own; None for the tier's.
        overrides: names of rules → texts of limits that hold instead of the rule's.
    """

    tier: str | msgspec.UnsetType = msgspec.UNSET
    name: str | msgspec.UnsetType = msgspec.UNSET
    expires_at_us: int | msgspec.UnsetType | None = msgspec.UNSET
    limits: Sequence[str] | msgspec.UnsetType | None = msgspec.UNSET
    overrides: Sequence[tuple[str, Sequence[str]]] | msgspec.UnsetType = msgspec.UNSET


async def create_key(editor: CatalogEditor, actor: str, fields: KeyFields) -> tuple[str, Form]:
    """Make an API key; only its digest is stored.

    Args:
        editor: of the catalog.
        actor: who asks.
        fields: the tier at least.

    Returns:
        The key itself, this once, and its form.

    Raises:
        BadRequest: if its time would be over already, or its name is refused.
        PolicyError: if a limit is refused.
        NotThere: if there is no such tier, or it has no rule that is overridden.
        CatalogUnavailable: if the database does not answer.
    """
    if isinstance(fields.expires_at_us, int) and fields.expires_at_us <= now_us():
        raise BadRequest("expires_at is past: give a moment to come, or leave it out for a key without end", field="expires_at")
    if fields.name is not msgspec.UNSET:
        require_label(fields.name, "name")
    async with editor.changing(actor) as change:
        tier = await load_tier_row(change, str(fields.tier))
        overrides = await _overrides(change, tier, (), fields)
        return await _insert_key(
            change,
            tier,
            name="" if fields.name is msgspec.UNSET else fields.name,
            expires_at_us=None if fields.expires_at_us is msgspec.UNSET else fields.expires_at_us,
            overrides=overrides,
        )


async def edit_key(editor: CatalogEditor, actor: str, key_id: str, fields: KeyFields, seen: Seen) -> Form:
    """AuditedTransaction what is said of an API key. Moved to another tier, it keeps its overrides only where they fit there.

    Args:
        editor: of the catalog.
        actor: who asks.
        key_id: its id.
        fields: what is to change.
        seen: revisions of which one must be in force.

    Returns:
        The key's form.

    Raises:
        BadRequest: if its name is refused.
        PolicyError: if a limit is refused.
        NotThere: if there is no such key or tier, or the tier has no rule that is overridden.
        StaleRevision: if it was changed since.
        ManagedByFile: if the policy file owns it.
        CatalogUnavailable: if the database does not answer.
    """
    if fields.name is not msgspec.UNSET:
        require_label(fields.name, "name")
    async with editor.changing(actor) as change:
        row = await held_key(change, key_id)
        require_editable(change, row, seen, f"the API key {row['id']}")
        tier = await load_tier_row(change, row["tier_name"] if fields.tier is msgspec.UNSET else fields.tier)
        values: dict[str, Any] = {
            "tier_id": tier["id"],
            "overrides": policy_rows.override_rows(await _overrides(change, tier, row["overrides"], fields)),
        }
        if fields.name is not msgspec.UNSET:
            values["name"] = fields.name
        if fields.expires_at_us is not msgspec.UNSET:
            values["expires_at_us"] = fields.expires_at_us
        return await update_key(change, row, values, "update", tier["name"])


async def rotate_key(editor: CatalogEditor, actor: str, key_id: str, grace_s: int, seen: Seen = None) -> tuple[str, Form, Form]:
    """Replace an API key by a new one of the same tier, name, end and overrides, which goes on with its counters: its owner has
    consumed what it has consumed.

    Args:
        editor: of the catalog.
        actor: who asks.
        key_id: id of the old key.
        grace_s: how long the old key still works, s; with 0 it is revoked now.
        seen: revisions of which one must be in force.

    Returns:
        The new key itself, this once; its form; the old key's form.

    Raises:
        CatalogError: if the old key is revoked or expired.
        NotThere: if there is no such key.
        StaleRevision: if it was changed since.
        ManagedByFile: if the policy file owns it.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.changing(actor) as change:
        row = await held_key(change, key_id)
        require_editable(change, row, seen, f"the API key {row['id']}")
        now = now_us()
        over = row["expires_at_us"] is not None and row["expires_at_us"] <= now
        if row["status"] != KeyStatus.ACTIVE.value or over:
            state = "expired" if row["status"] == KeyStatus.ACTIVE.value else "revoked"
            raise CatalogError(f"the API key {row['id']} is {state}: make a new one instead")
        tier = await load_tier_row(change, row["tier_name"])
        overrides = policy_rows.api_key_of(row).overrides
        api_key, form = await _insert_key(
            change,
            tier,
            name=row["name"],
            expires_at_us=row["expires_at_us"],
            overrides=overrides,
            action="rotate",
            counts_as=row["counts_as"] or row["id"],
        )
        values: dict[str, Any]
        if grace_s:
            until = now + grace_s * US_PER_S
            values = {"expires_at_us": until if row["expires_at_us"] is None else min(until, row["expires_at_us"])}
        else:
            values = _revoked(f"replaced by {form['id']}")
        return api_key, form, await update_key(change, row, values, "rotate")


async def revoke_key(editor: CatalogEditor, actor: str, key_id: str, reason: str, seen: Seen = None) -> Form:
    """Revoke an API key.

    Args:
        editor: of the catalog.
        actor: who asks.
        key_id: its id.
        reason: why, 1 to 1000 characters.
        seen: revisions of which one must be in force.

    Returns:
        The key's form.

    Raises:
        CatalogError: if it is revoked already.
        NotThere: if there is no such key.
        StaleRevision: if it was changed since.
        ManagedByFile: if the policy file owns it.
        CatalogUnavailable: if the database does not answer.
    """
    if not reason.strip():
        raise BadRequest("reason is empty: say why the key is revoked, for those who look later", field="reason")
    async with editor.changing(actor) as change:
        row = await held_key(change, key_id)
        require_editable(change, row, seen, f"the API key {row['id']}")
        if row["status"] == KeyStatus.REVOKED.value:
            raise CatalogError(f"the API key {row['id']} is revoked already")
        return await update_key(change, row, _revoked(reason), "revoke")


async def delete_key(editor: CatalogEditor, actor: str, key_id: str, seen: Seen) -> None:
    """Remove the record of an API key that is revoked or expired.

    Args:
        editor: of the catalog.
        actor: who asks.
        key_id: its id.
        seen: revisions of which one must be in force.

    Raises:
        CatalogError: if the key still works.
        NotThere: if there is no such key.
        StaleRevision: if it was changed since.
        ManagedByFile: if the policy file owns it.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.changing(actor) as change:
        row = await held_key(change, key_id)
        require_editable(change, row, seen, f"the API key {row['id']}")
        over = row["expires_at_us"] is not None and row["expires_at_us"] <= now_us()
        if row["status"] == KeyStatus.ACTIVE.value and not over:
            raise CatalogError(f"the API key {row['id']} still works: revoke it first, with a reason")
        change.touch(KEY, row["sha256"])
        await change.connection.execute(delete(api_keys).where(api_keys.c.id == row["id"]))
        await change.audit("delete", "api_key", row["id"], key_form(row), None)


async def update_key(
    change: AuditedTransaction, row: RowMapping, values: Mapping[str, Any], action: str, tier_name: str | None = None
) -> Form:
    """AuditedTransaction columns of a key's row.

    Args:
        change: the transaction.
        row: the key's row.
        values: column → value.
        action: for the audit log.
        tier_name: of its tier, where that changes.

    Returns:
        The key's form.
    """
    change.touch(KEY, row["sha256"])
    written = {**values, "managed_by_file": False, "revision": row["revision"] + 1}
    await change.connection.execute(update(api_keys).where(api_keys.c.id == row["id"]).values(written))
    form = key_form({**row, **written, "tier_name": tier_name or row["tier_name"]})
    await change.audit(action, "api_key", row["id"], key_form(row), form)
    return form


async def held_key(change: AuditedTransaction, key_id: str) -> RowMapping:
    """The row of an API key, with its tier's name.

    Args:
        change: the transaction.
        key_id: its id.

    Returns:
        The row.

    Raises:
        NotThere: if there is none.
    """
    row = await change.one(key_rows().where(api_keys.c.id == key_id)) if is_key_id(key_id) else None
    if row is None:
        raise no_such_key(key_id)
    return row


def is_key_id(text: str) -> bool:
    """Whether a text has the form of a key's id: 24 hex digits.

    Args:
        text: any.

    Returns:
        True if it has.
    """
    return _ID.fullmatch(text) is not None


def no_such_key(key_id: str) -> NotThere:
    """The error of an id that no key has. What was given is not repeated: it may be the key itself.

    Args:
        key_id: what was given.

    Returns:
        The error.
    """
    if is_key_id(key_id):
        return NotThere(f"there is no API key {key_id}: see GET /admin/v1/api-keys")
    return NotThere("that is no id of an API key: an id has 24 hex digits, see GET /admin/v1/api-keys")


def key_rows() -> Any:
    """A select of API keys with their tiers' names, without order.

    Returns:
        The query.
    """
    return select(api_keys, tiers.c.name.label("tier_name")).join(tiers, tiers.c.id == api_keys.c.tier_id)


async def _insert_key(
    change: AuditedTransaction,
    tier: RowMapping,
    name: str,
    expires_at_us: int | None,
    overrides: tuple[Override, ...],
    action: str = "create",
    counts_as: str | None = None,
) -> tuple[str, Form]:
    api_key = make_api_key()
    record = ApiKey(hash_api_key(api_key), tier["name"], name=name, expires_at_us=expires_at_us, overrides=overrides)
    change.touch(KEY, record.sha256)
    await change.connection.execute(
        insert(api_keys).values({**policy_rows.row_of_api_key(record, tier["id"], now_us()), "counts_as": counts_as})
    )
    form = key_form(await held_key(change, record.id))
    await change.audit(action, "api_key", record.id, None, form)
    return api_key, form


def _revoked(reason: str) -> dict[str, Any]:
    return {"status": KeyStatus.REVOKED.value, "revoked_at_us": now_us(), "revoked_reason": reason}


async def _overrides(
    change: AuditedTransaction, tier: RowMapping, held: Collection[Mapping[str, Any]], fields: KeyFields
) -> tuple[Override, ...]:
    """The overrides that a key has after a change: those given, else those held; each fits a rule of the tier."""
    found: list[Override] = []
    if fields.limits is msgspec.UNSET:
        found += [_override(each) for each in held if not each["rule"]]
    elif fields.limits:
        found.append(Override("", fit_limits(Algorithm.SLIDING_WINDOW, [Limit.parse(text) for text in fields.limits])))
    if fields.overrides is msgspec.UNSET:
        kept = [_override(each) for each in held if each["rule"]]
        # Of those held, a rule that is gone takes its override with it; only those given now are refused.
        rules = await _rules(change, tier, [each.rule for each in kept]) if fields.tier is not msgspec.UNSET else None
        found += [each for each in kept if rules is None or _fits(rules.get(each.rule), each)]
        return tuple(found)
    rules = await _rules(change, tier, [name for name, _ in fields.overrides])
    seen: set[str] = set()
    for name, texts in fields.overrides:
        rule = rules.get(name)
        if rule is None:
            raise PolicyError(f"tier {tier['name']!r} has no rule {name[:60]!r} to override: see GET /admin/v1/rate-limit-rules")
        if rule["subject"] != Subject.API_KEY.value:
            raise PolicyError(
                f"rule {name!r} counts by {rule['subject']}, not by API key: a key cannot have limits of its own there"
            )
        if name in seen:
            raise PolicyError(f"rule {name!r} is overridden twice: remove one")
        seen.add(name)
        limits = tuple(Limit.parse(text) for text in texts)
        fit_limits(Algorithm(rule["algorithm"]), limits)
        found.append(Override(name, limits))
    return tuple(found)


async def _rules(change: AuditedTransaction, tier: RowMapping, names: Collection[str]) -> dict[str, RowMapping]:
    query = select(rate_limit_rules.c.name, rate_limit_rules.c.subject, rate_limit_rules.c.algorithm).where(
        rate_limit_rules.c.tier_id == tier["id"], rate_limit_rules.c.name.in_(list(names))
    )
    return {row["name"]: row for row in (await change.connection.execute(query)).mappings()}


def _override(held: Mapping[str, Any]) -> Override:
    return Override(held["rule"], tuple(Limit.parse(text) for text in held["limits"]))


def _fits(rule: RowMapping | None, override: Override) -> bool:
    if rule is None or rule["subject"] != Subject.API_KEY.value:
        return False
    try:
        fit_limits(Algorithm(rule["algorithm"]), override.limits)
    except PolicyError:
        return False
    return True
