"""Importing API keys that another system issued: by digest, in batches, repeatable.

A batch is one transaction. Rows that are invalid or conflict are reported and left out; the others are inserted. A key that
exists already with the same tier, name and expiry is counted as unchanged, so an import that was interrupted is simply run again.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Final

import msgspec
from pydantic import Field
from sqlalchemy import select

from tidegate.admin.api_keys import key_rows
from tidegate.admin.customers import customer_rows
from tidegate.admin.models import JsonObject, KeyRead, Name, Plain, RequestModel, ResponseModel, TierName, Timestamp
from tidegate.admin.models.customers import CustomerName
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import AuditedTransaction, audited
from tidegate.catalog.changes import KEY
from tidegate.catalog.sql import rows as policy_rows
from tidegate.catalog.sql.bulk import batches, insert_rows
from tidegate.catalog.sql.tables import api_keys, customers, tiers
from tidegate.errors import BadRequest, PolicyError
from tidegate.policy.key_format import parse_key_digest
from tidegate.policy.labels import require_label
from tidegate.policy.model import ApiKey
from tidegate.timestamps import format_timestamp, now_us, parse_timestamp

MAX_KEYS: Final = 1000
"""Keys of one batch."""

Digest = Annotated[str, Field(max_length=64), Plain]


class KeyImport(RequestModel):
    """An API key to be imported."""

    sha256: Annotated[Digest | None, Field(description="SHA-256 of the key, 64 hex digits")] = None
    hmac_sha256: Annotated[
        Digest | None, Field(description='with keys.hash = "hmac-sha256": HMAC-SHA-256 of the key under the pepper')
    ] = None
    tier: Annotated[TierName | None, Field(description="may be omitted for the tier of the customer")] = None
    customer: CustomerName | None = None
    name: Name = ""
    expires_at: Timestamp | None = None


class KeyImportRequest(RequestModel):
    """A batch of API keys to be imported."""

    keys: Annotated[list[KeyImport], Field(min_length=1, max_length=MAX_KEYS)]
    dry_run: bool = False


class KeyImportProblem(ResponseModel):
    """Why a row was not imported."""

    row: Annotated[int, Field(description="its place in the batch, from 0")]
    message: str


class KeyImportResult(ResponseModel):
    """What became of a batch."""

    imported: Annotated[int, Field(description="keys that are new; with dry_run, that would be")]
    unchanged: Annotated[int, Field(description="keys that existed with the same tier, name, expiry and customer")]
    problems: list[KeyImportProblem]


async def import_keys(editor: CatalogEditor, actor: str, request: KeyImportRequest) -> KeyImportResult:
    """Import a batch.

    Returns:
        How many keys are new, how many existed, and what is wrong with each other row.

    Raises:
        CatalogUnavailable: if the database does not answer; then nothing of the batch was imported.
    """
    now = now_us()
    if request.dry_run:
        async with editor.reading() as connection:
            return (await _plan(connection, request, now)).result
    async with editor.changing(actor) as transaction:
        plan = await _plan(transaction.connection, request, now)
        await _insert(transaction, plan, now)
        return plan.result


class _Plan:
    """The valid new keys of a batch, and what is said of the batch; each key with the ids of its tier and customer."""

    def __init__(self) -> None:
        self.records: list[tuple[ApiKey, int, int | None]] = []
        self.result = KeyImportResult(imported=0, unchanged=0, problems=[])


async def _plan(connection: Any, request: KeyImportRequest, now: int) -> _Plan:
    tier_ids = {row.name: row.id for row in await connection.execute(select(tiers.c.name, tiers.c.id))}
    owners = await _owners(connection, {sent.customer for sent in request.keys if sent.customer is not None})
    plan = _Plan()
    valid: dict[str, tuple[int, ApiKey]] = {}
    for number, sent in enumerate(request.keys):
        try:
            record = _record_of(sent, tier_ids, owners, now)
            if record.sha256 in valid:
                raise BadRequest("the same key is in an earlier row: remove one")
            valid[record.sha256] = (number, record)
        except (BadRequest, PolicyError) as error:
            plan.result.problems.append(KeyImportProblem(row=number, message=error.message))
    existing = await _existing(connection, list(valid))
    for digest, (number, record) in valid.items():
        known = existing.get(digest)
        if known is None:
            plan.records.append((record, tier_ids[record.tier], owners[record.customer].id if record.customer else None))
        elif known == (record.tier, record.name, record.expires_at_us, record.customer or None):
            plan.result.unchanged += 1
        else:
            plan.result.problems.append(
                KeyImportProblem(
                    row=number,
                    message=f"the key exists as {record.id} with another tier, name, expiry or customer: change it with "
                    "'tidegate keys' or the admin API",
                )
            )
    plan.result.problems.sort(key=lambda problem: problem.row)
    plan.result.imported = len(plan.records)
    return plan


class _Owner(msgspec.Struct, frozen=True):
    """A customer: its id, and the name of its tier, None for none."""

    id: int
    tier: str | None


async def _owners(connection: Any, names: Collection[str]) -> dict[str, _Owner]:
    """The customers that exist, by name."""
    found: dict[str, _Owner] = {}
    for batch in batches(list(names)):
        for row in (await connection.execute(customer_rows().where(customers.c.name.in_(batch)))).mappings():
            found[row["name"]] = _Owner(row["id"], row["tier_name"])
    return found


def _record_of(sent: KeyImport, tier_ids: dict[str, int], owners: dict[str, _Owner], now: int) -> ApiKey:
    digest = parse_key_digest(sha256=sent.sha256, hmac_sha256=sent.hmac_sha256)
    if sent.customer is not None and sent.customer not in owners:
        raise BadRequest(f"there is no customer {sent.customer!r}: see 'tidegate customers list'")
    tier = sent.tier or (None if sent.customer is None else owners[sent.customer].tier)
    if tier is None:
        raise BadRequest("the tier is missing: name one, or a customer that has one")
    if tier not in tier_ids:
        raise BadRequest(f"there is no tier {tier!r}: see 'tidegate tiers'")
    require_label(sent.name, "name")
    expires_at_us = None if sent.expires_at is None else parse_timestamp(sent.expires_at, "expires_at")
    if expires_at_us is not None and expires_at_us <= now:
        raise BadRequest("expires_at is in the past: the key would never work")
    return ApiKey(
        digest,
        tier,
        name=sent.name,
        expires_at_us=expires_at_us,
        customer=sent.customer or "",
        inherits_tier=sent.tier is None,
    )


async def _existing(connection: Any, digests: list[str]) -> dict[str, tuple[str, str, int | None, str | None]]:
    """Tier, name, expiry and customer of the keys that exist, by digest."""
    found: dict[str, tuple[str, str, int | None, str | None]] = {}
    for batch in batches(digests):
        for row in (await connection.execute(key_rows().where(api_keys.c.sha256.in_(batch)))).mappings():
            found[row["sha256"]] = (row["tier_name"], row["name"], row["expires_at_us"], row["customer_name"])
    return found


async def _insert(transaction: AuditedTransaction, plan: _Plan, now: int) -> None:
    rows = []
    changes = []
    common: JsonObject | None = None
    for record, tier_id, customer_id in plan.records:
        values = policy_rows.row_of_api_key(record, tier_id, now, customer_id)
        rows.append(values)
        transaction.touch(KEY, record.sha256)
        common = common or audited(KeyRead.of_row(_joined_row(values, record)))
        assert common is not None, "a key has fields"
        # All else is the same for new keys, and a model for each takes a third of the import.
        after = {
            **common,
            "id": record.id,
            "tier": record.tier,
            "name": record.name,
            "expires_at": format_timestamp(record.expires_at_us),
            "counts_as": record.id,
            "customer": record.customer or None,
            "inherits_tier": record.inherits_tier,
        }
        changes.append({"action": "import", "kind": "api_key", "target": record.id, "before": None, "after": after})
    if rows:
        await insert_rows(transaction.connection, api_keys, rows)
        await transaction.audit_all(changes)


def _joined_row(values: dict[str, Any], record: ApiKey) -> dict[str, Any]:
    """The row of a new key as a query with its tier and customer gives it."""
    names = {"tier_name": record.tier, "customer_name": record.customer or None}
    return {**values, **names, "revoked_at_us": None, "revoked_reason": None, "counts_as": None, "revision": 1}
