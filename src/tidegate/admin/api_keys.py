"""Changes of API keys by operators; `rules` does the same for tiers and rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import RowMapping, delete, insert, select, update

from tidegate.admin.customers import load_customer_row
from tidegate.admin.models import KeyCreate, KeyMade, KeyPatch, KeyRead, KeyRotated, RevokeRequest, is_key_id
from tidegate.admin.overrides import overrides_after
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import AuditedTransaction, ExpectedRevisions, NotFound, load_tier_row, require_editable
from tidegate.catalog.changes import KEY
from tidegate.catalog.sql import rows as policy_rows
from tidegate.catalog.sql.tables import api_keys, customers, tiers
from tidegate.errors import BadRequest, CatalogError
from tidegate.policy.key_format import hash_api_key, make_api_key
from tidegate.policy.labels import require_label
from tidegate.policy.model import ApiKey, KeyStatus
from tidegate.policy.overrides import Override, active_overrides
from tidegate.timestamps import US_PER_S, now_us, parse_timestamp


async def create_key(editor: CatalogEditor, actor: str, request: KeyCreate) -> KeyMade:
    """Create an API key; only its digest is stored, and only this result contains the key itself.

    Raises:
        BadRequest: if `expires_at` is not a timestamp or is in the past, or the name is not valid.
        PolicyError: if a limit is not valid.
        NotFound: if there is no such tier, or it has no rule of an override's name.
        CatalogUnavailable: if the database does not answer.
    """
    expires_at_us = _expires_at_us(request)
    if expires_at_us is not None and expires_at_us <= now_us():
        raise BadRequest(
            "expires_at is in the past: send a later time, or leave it out for a key that never expires", field="expires_at"
        )
    require_label(request.name, "name")
    async with editor.changing(actor) as transaction:
        customer = None if request.customer is None else await load_customer_row(transaction, request.customer)
        tier, inherits = await _tier_of(transaction, request.tier, customer)
        overrides = await overrides_after(transaction, tier, (), request, changes_tier=False, counts_quotas=customer is None)
        return await _insert_key(transaction, tier, request.name, expires_at_us, overrides, _owner(customer, inherits))


async def edit_key(
    editor: CatalogEditor, actor: str, key_id: str, request: KeyPatch, expected_revisions: ExpectedRevisions
) -> KeyRead:
    """Change the fields of an API key that the request sets. Moved to another tier, it keeps the overrides that fit there.

    Raises:
        BadRequest: if `expires_at` is not a timestamp, or the name is not valid.
        PolicyError: if a limit is not valid.
        NotFound: if there is no such key or tier, or the tier has no rule of an override's name.
        StaleRevision: if the key's revision is not an expected one.
        ManagedByFile: if the policy file owns the key.
        CatalogUnavailable: if the database does not answer.
    """
    values: dict[str, Any] = {}
    if "name" in request.model_fields_set:
        require_label(request.name, "name")
        values["name"] = request.name
    if "expires_at" in request.model_fields_set:
        values["expires_at_us"] = _expires_at_us(request)
    async with editor.changing(actor) as transaction:
        row = await _load_editable_key_row(transaction, key_id, expected_revisions)
        sent = request.model_fields_set
        customer_name = request.customer if "customer" in sent else row["customer_name"]
        customer = None if customer_name is None else await load_customer_row(transaction, customer_name)
        wants_customers = "tier" in sent if request.tier is None else False
        has_tier = customer is not None and customer["tier_name"] is not None
        named = request.tier or (None if has_tier and (wants_customers or row["inherits_tier"]) else row["tier_name"])
        tier, inherits = await _tier_of(transaction, named, customer)
        values |= {"tier_id": tier["id"], **_owner(customer, inherits)}
        overrides = await overrides_after(
            transaction,
            tier,
            row["overrides"],
            request,
            changes_tier=tier["id"] != row["tier_id"],
            counts_quotas=customer is None,
        )
        values["overrides"] = policy_rows.override_rows(overrides)
        return await update_key(transaction, row, values, "update", tier["name"], customer_name)


async def rotate_key(
    editor: CatalogEditor, actor: str, key_id: str, grace_s: int, expected_revisions: ExpectedRevisions = None
) -> KeyRotated:
    """Replace an API key by a new one with the same tier, name, expiry, overrides and counters: consumption is kept.

    Args:
        grace_s: how long the old key remains valid, s; with 0 it is revoked at once.

    Returns:
        The new key, which no other result contains, and both records.

    Raises:
        CatalogError: if the old key is revoked or expired.
        NotFound: if there is no such key.
        StaleRevision: if the key's revision is not an expected one.
        ManagedByFile: if the policy file owns the key.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.changing(actor) as transaction:
        row = await _load_editable_key_row(transaction, key_id, expected_revisions)
        now = now_us()
        if not _is_valid(row, now):
            state = "expired" if row["status"] == KeyStatus.ACTIVE.value else "revoked"
            raise CatalogError(f"the API key {row['id']} is {state}: create a new one instead")
        created = await _insert_key(
            transaction,
            await load_tier_row(transaction, row["tier_name"]),
            row["name"],
            row["expires_at_us"],
            active_overrides(policy_rows.overrides_of(row["overrides"]), now),
            {"customer_id": row["customer_id"], "inherits_tier": row["inherits_tier"]},
            action="rotate",
            counts_as=row["counts_as"] or row["id"],
        )
        if grace_s:
            until = now + grace_s * US_PER_S
            values = {"expires_at_us": until if row["expires_at_us"] is None else min(until, row["expires_at_us"])}
        else:
            values = _revoked(f"replaced by {created.id}")
        replaced = await update_key(transaction, row, values, "rotate")
    return KeyRotated(**dict(created), replaces=replaced)


async def revoke_key(
    editor: CatalogEditor, actor: str, key_id: str, request: RevokeRequest, expected_revisions: ExpectedRevisions = None
) -> KeyRead:
    """Revoke an API key.

    Raises:
        BadRequest: if the reason is blank.
        CatalogError: if the key is revoked already.
        NotFound: if there is no such key.
        StaleRevision: if the key's revision is not an expected one.
        ManagedByFile: if the policy file owns the key.
        CatalogUnavailable: if the database does not answer.
    """
    if not request.reason.strip():
        raise BadRequest("reason is empty: give the reason for the revocation", field="reason")
    async with editor.changing(actor) as transaction:
        row = await _load_editable_key_row(transaction, key_id, expected_revisions)
        if row["status"] == KeyStatus.REVOKED.value:
            raise CatalogError(f"the API key {row['id']} is revoked already")
        return await update_key(transaction, row, _revoked(request.reason), "revoke")


async def delete_key(editor: CatalogEditor, actor: str, key_id: str, expected_revisions: ExpectedRevisions) -> None:
    """Delete the record of an API key that is revoked or expired.

    Raises:
        CatalogError: if the key still works.
        NotFound: if there is no such key.
        StaleRevision: if the key's revision is not an expected one.
        ManagedByFile: if the policy file owns the key.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.changing(actor) as transaction:
        row = await _load_editable_key_row(transaction, key_id, expected_revisions)
        if _is_valid(row, now_us()):
            raise CatalogError(f"the API key {row['id']} still works: revoke it first, with a reason")
        transaction.touch(KEY, row["sha256"])
        await transaction.connection.execute(delete(api_keys).where(api_keys.c.id == row["id"]))
        await transaction.audit("delete", "api_key", row["id"], KeyRead.of_row(row), None)


async def update_key(
    transaction: AuditedTransaction,
    row: RowMapping,
    values: Mapping[str, Any],
    action: str,
    tier_name: str | None = None,
    customer_name: str | None = None,
) -> KeyRead:
    """Update a key's row, and audit it.

    Args:
        tier_name: name of the new tier; None if tier and customer do not change.
        customer_name: name of the new customer, if there is a new tier; None for none.
    """
    transaction.touch(KEY, row["sha256"])
    written = {**values, "managed_by_file": False, "revision": row["revision"] + 1}
    await transaction.connection.execute(update(api_keys).where(api_keys.c.id == row["id"]).values(written))
    names = {} if tier_name is None else {"tier_name": tier_name, "customer_name": customer_name}
    before, after = KeyRead.of_row(row), KeyRead.of_row({**row, **written, **names})
    await transaction.audit(action, "api_key", row["id"], before, after)
    return after


async def load_key_row(transaction: AuditedTransaction, key_id: str) -> RowMapping:
    """The row of an API key, with its tier's name.

    Raises:
        NotFound: if there is no such key.
    """
    row = await transaction.one(key_rows().where(api_keys.c.id == key_id)) if is_key_id(key_id) else None
    if row is None:
        raise no_such_key(key_id)
    return row


def no_such_key(key_id: str) -> NotFound:
    """The error for an unknown key id. The message does not contain a text that is not an id: it may be the key itself."""
    if is_key_id(key_id):
        return NotFound(f"there is no API key {key_id}: see GET /admin/v1/api-keys")
    return NotFound("that is not the id of an API key: an id has 24 hex digits, see GET /admin/v1/api-keys")


def key_rows() -> Any:
    """A query for API keys with the names of their tiers and customers, unordered."""
    names = (tiers.c.name.label("tier_name"), customers.c.name.label("customer_name"))
    with_tier = select(api_keys, *names).join(tiers, tiers.c.id == api_keys.c.tier_id)
    return with_tier.outerjoin(customers, customers.c.id == api_keys.c.customer_id)


async def _load_editable_key_row(
    transaction: AuditedTransaction, key_id: str, expected_revisions: ExpectedRevisions
) -> RowMapping:
    row = await load_key_row(transaction, key_id)
    require_editable(transaction, row, expected_revisions, f"the API key {row['id']}")
    return row


async def _insert_key(
    transaction: AuditedTransaction,
    tier: RowMapping,
    name: str,
    expires_at_us: int | None,
    overrides: tuple[Override, ...],
    owner: Mapping[str, Any],
    action: str = "create",
    counts_as: str | None = None,
) -> KeyMade:
    api_key = make_api_key()
    record = ApiKey(hash_api_key(api_key), tier["name"], name=name, expires_at_us=expires_at_us, overrides=overrides)
    transaction.touch(KEY, record.sha256)
    await transaction.connection.execute(
        insert(api_keys).values({**policy_rows.row_of_api_key(record, tier["id"], now_us()), **owner, "counts_as": counts_as})
    )
    created = KeyRead.of_row(await load_key_row(transaction, record.id))
    await transaction.audit(action, "api_key", record.id, None, created)
    return KeyMade(**dict(created), api_key=api_key)


async def _tier_of(transaction: AuditedTransaction, name: str | None, customer: RowMapping | None) -> tuple[RowMapping, bool]:
    """The tier of a key, and whether it is that of its customer.

    Args:
        name: of the key's own tier; None for the customer's.

    Raises:
        BadRequest: if there is neither.
        NotFound: if there is no such tier.
    """
    if name is not None:
        return await load_tier_row(transaction, name), False
    if customer is None or customer["tier_name"] is None:
        of_customer = "" if customer is None else f", because the customer {customer['name']!r} has none"
        raise BadRequest(f"tier is missing{of_customer}: add it, or name a customer that has a tier", field="tier")
    return await load_tier_row(transaction, customer["tier_name"]), True


def _owner(customer: RowMapping | None, inherits: bool) -> dict[str, Any]:
    return {"customer_id": None if customer is None else customer["id"], "inherits_tier": inherits}


def _expires_at_us(request: KeyCreate | KeyPatch) -> int | None:
    return None if request.expires_at is None else parse_timestamp(request.expires_at, "expires_at")


def _is_valid(row: RowMapping, now: int) -> bool:
    return row["status"] == KeyStatus.ACTIVE.value and (row["expires_at_us"] is None or row["expires_at_us"] > now)


def _revoked(reason: str) -> dict[str, Any]:
    return {"status": KeyStatus.REVOKED.value, "revoked_at_us": now_us(), "revoked_reason": reason}
