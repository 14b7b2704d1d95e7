"""Changes and lists of customers by operators."""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import RowMapping, or_, select, update

from tidegate.admin.models import CustomerCreate, CustomerFields, CustomerPatch, CustomerRead
from tidegate.admin.overrides import overrides_after
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import AuditedTransaction, ExpectedRevisions, NotFound, load_tier_row, require_editable
from tidegate.catalog.changes import KEY
from tidegate.catalog.sql.customers import customer_of, row_of_customer, write_customers
from tidegate.catalog.sql.paging import Page, page_of, rows_of
from tidegate.catalog.sql.tables import api_keys, customers, tiers
from tidegate.errors import CatalogError
from tidegate.policy.customers import Customer
from tidegate.policy.model import KeyStatus
from tidegate.timestamps import now_us

_OWN = ("external_id", "anchor", "timezone", "metadata", "match")


async def create_customer(editor: CatalogEditor, actor: str, request: CustomerCreate) -> CustomerRead:
    """Create a customer.

    Raises:
        PolicyError: if a field is not valid.
        BadRequest: if an override ends in the past.
        NotFound: if there is no such tier.
        CatalogError: if there is such a customer already, or another one has its external id or one of its attribute values.
        CatalogUnavailable: if the database does not answer.
    """
    made = Customer.make(request.name, **_own_fields(request))
    async with editor.changing(actor) as transaction:
        if await _row(transaction, request.name) is not None:
            raise CatalogError(f"there is a customer {request.name!r} already: change it, or choose another name")
        tier = None if request.tier is None else await load_tier_row(transaction, request.tier)
        overrides = await overrides_after(transaction, tier, (), request, "customer", changes_tier=False)
        values = row_of_customer(_with(made, tier, overrides), None if tier is None else tier["id"])
        await write_customers(transaction, [values], [], [])
        created = CustomerRead.of_row(await load_customer_row(transaction, request.name))
        await transaction.audit("create", "customer", request.name, None, created)
    return created


async def edit_customer(
    editor: CatalogEditor, actor: str, name: str, request: CustomerPatch, expected_revisions: ExpectedRevisions
) -> CustomerRead:
    """Change the fields of a customer that the request sets. With another tier it keeps the overrides that fit there.

    Raises:
        PolicyError: if a field is not valid.
        BadRequest: if an override ends in the past.
        NotFound: if there is no such customer or tier.
        CatalogError: if another customer has its external id or one of its attribute values, or keys need its tier.
        StaleRevision: if its revision is not an expected one.
        ManagedByFile: if the policy file owns it.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.changing(actor) as transaction:
        row = await load_customer_row(transaction, name)
        require_editable(transaction, row, expected_revisions, f"the customer {name!r}")
        current = customer_of(row, with_metadata=True)
        kept = {
            "external_id": current.external_id,
            "anchor": current.anchor,
            "timezone": current.timezone,
            "metadata": msgspec.json.decode(current.metadata) if current.metadata else None,
            "match": {attribute: list(values) for attribute, values in current.match},
        }
        made = Customer.make(name, **{**kept, **_own_fields(request)})
        tier_name = request.tier if "tier" in request.model_fields_set else row["tier_name"]
        tier = None if tier_name is None else await load_tier_row(transaction, tier_name)
        if tier is None and row["tier_id"] is not None:
            await _require_no_inheriting_key(transaction, row)
        changes_tier = (None if tier is None else tier["id"]) != row["tier_id"]
        overrides = await overrides_after(transaction, tier, row["overrides"], request, "customer", changes_tier=changes_tier)
        values = row_of_customer(_with(made, tier, overrides), None if tier is None else tier["id"])
        await write_customers(transaction, [], [(row, {**values, "revision": row["revision"] + 1})], [])
        changed = CustomerRead.of_row(await load_customer_row(transaction, name))
        await transaction.audit("update", "customer", name, CustomerRead.of_row(row), changed)
    return changed


async def delete_customer(editor: CatalogEditor, actor: str, name: str, expected_revisions: ExpectedRevisions) -> None:
    """Delete a customer without active API keys; its revoked and expired keys keep their records.

    Raises:
        CatalogError: if it has active API keys.
        NotFound: if there is no such customer.
        StaleRevision: if its revision is not an expected one.
        ManagedByFile: if the policy file owns it.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.changing(actor) as transaction:
        row = await load_customer_row(transaction, name)
        require_editable(transaction, row, expected_revisions, f"the customer {name!r}")
        owned = api_keys.c.customer_id == row["id"]
        lasting = or_(api_keys.c.expires_at_us.is_(None), api_keys.c.expires_at_us > now_us())
        active = select(api_keys.c.id).where(owned, api_keys.c.status == KeyStatus.ACTIVE.value, lasting)
        key = await transaction.one(active.limit(1))
        if key is not None:
            raise CatalogError(
                f"the customer {name!r} has active API keys, e.g. {key['id']}: revoke them, or move them to another customer "
                f"first; see 'tidegate keys list --customer {name}'"
            )
        for sha256 in (await transaction.connection.execute(select(api_keys.c.sha256).where(owned))).scalars():
            transaction.touch(KEY, sha256)
        await transaction.connection.execute(update(api_keys).where(owned).values(customer_id=None, inherits_tier=False))
        await write_customers(transaction, [], [], [row])
        await transaction.audit("delete", "customer", name, CustomerRead.of_row(row), None)


async def list_customers(
    editor: CatalogEditor,
    limit: int,
    after: str | None,
    tier: str | None = None,
    external_id: str | None = None,
    name_prefix: str | None = None,
) -> Page[CustomerRead]:
    """Customers by name.

    Raises:
        CatalogUnavailable: if the database does not answer.
    """
    query = customer_rows().order_by(customers.c.name)
    if tier is not None:
        query = query.where(tiers.c.name == tier)
    if external_id is not None:
        query = query.where(customers.c.external_id == external_id)
    if name_prefix is not None:
        query = query.where(customers.c.name.startswith(name_prefix, autoescape=True))
    if after is not None:
        query = query.where(customers.c.name > after)
    rows = await rows_of(editor.catalog.database, query, limit)
    return page_of([CustomerRead.of_row(row) for row in rows], limit, lambda item: str(item.name))


async def get_customer(editor: CatalogEditor, name: str) -> CustomerRead:
    """One customer.

    Raises:
        NotFound: if it does not exist.
        CatalogUnavailable: if the database does not answer.
    """
    rows = await rows_of(editor.catalog.database, customer_rows().where(customers.c.name == name), 1)
    if not rows:
        raise no_such_customer(name)
    return CustomerRead.of_row(rows[0])


async def load_customer_row(transaction: AuditedTransaction, name: str) -> RowMapping:
    """The row of a customer, with the name of its tier.

    Raises:
        NotFound: if there is no such customer.
    """
    row = await _row(transaction, name)
    if row is None:
        raise no_such_customer(name)
    return row


def customer_rows() -> Any:
    """A query for customers with the names of their tiers, unordered."""
    return select(customers, tiers.c.name.label("tier_name")).outerjoin(tiers, tiers.c.id == customers.c.tier_id)


def no_such_customer(name: str) -> NotFound:
    """The error for an unknown customer."""
    return NotFound(f"there is no customer {name[:64]!r}: see GET /admin/v1/customers")


async def _row(transaction: AuditedTransaction, name: str) -> RowMapping | None:
    return await transaction.one(customer_rows().where(customers.c.name == name))


async def _require_no_inheriting_key(transaction: AuditedTransaction, row: RowMapping) -> None:
    inheriting = select(api_keys.c.id).where(api_keys.c.customer_id == row["id"], api_keys.c.inherits_tier).limit(1)
    key = await transaction.one(inheriting)
    if key is not None:
        raise CatalogError(
            f"the customer {row['name']!r} has API keys without a tier of their own, e.g. {key['id']}: give the customer another "
            "tier, or these keys one of their own first"
        )


def _own_fields(request: CustomerFields) -> dict[str, Any]:
    """The fields that came and that concern no other row."""
    return {field: getattr(request, field) or "" for field in _OWN[:3] if field in request.model_fields_set} | {
        field: getattr(request, field) or None for field in _OWN[3:] if field in request.model_fields_set
    }


def _with(customer: Customer, tier: RowMapping | None, overrides: Any) -> Customer:
    return msgspec.structs.replace(customer, tier="" if tier is None else tier["name"], overrides=overrides)
