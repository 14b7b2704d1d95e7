"""Rows of customers: what checks read of them, and what changes write."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import bindparam, delete, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tidegate.catalog.changes import ANONYMOUS, CUSTOMER, CUSTOMER_VALUE
from tidegate.catalog.sql.batch_loader import BatchLoader
from tidegate.catalog.sql.bulk import batches, delete_rows, insert_rows, update_rows
from tidegate.catalog.sql.change_log import WriteTransaction
from tidegate.catalog.sql.database import Database
from tidegate.catalog.sql.rows import override_rows, overrides_of
from tidegate.catalog.sql.tables import api_keys, customer_values, customers, policy_state, tiers
from tidegate.errors import CatalogError
from tidegate.policy.customers import Customer, value_digest
from tidegate.timestamps import now_us

CUSTOMER_COLUMNS: Final = (
    "external_id",
    "tier_id",
    "anchor",
    "timezone",
    "metadata",
    "match_attributes",
    "overrides",
)
"""Columns with the fields of a customer, without its name."""
_NAMES: Final = "names"
_WRITTEN: Final = (*CUSTOMER_COLUMNS, "managed_by_file", "revision")

# One statement each: its result is one snapshot on every database.
_CUSTOMERS: Final = select(policy_state.c.version.label("read_version"), customers, tiers.c.name.label("tier_name")).select_from(
    policy_state.outerjoin(
        customers.outerjoin(tiers, tiers.c.id == customers.c.tier_id), customers.c.name.in_(bindparam(_NAMES, expanding=True))
    )
)
_OWNERS: Final = select(
    policy_state.c.version.label("read_version"), customer_values.c.digest, customers.c.name.label("customer_name")
).select_from(
    policy_state.outerjoin(
        customer_values.join(customers, customers.c.id == customer_values.c.customer_id),
        customer_values.c.digest.in_(bindparam(_NAMES, expanding=True)),
    )
)


class CustomerReader:
    """Looks up customers for checks; lookups that arrive together share a query."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._customers = BatchLoader(self._read_customers)
        self._owners = BatchLoader(self._read_owners)

    async def customer(self, name: str, min_version: int) -> tuple[int, Customer | None]:
        """See `Catalog.customer`."""
        return await self._customers.get(name, min_version)

    async def customer_name(self, digest: str, min_version: int) -> tuple[int, str]:
        """See `Catalog.customer_name`."""
        version, name = await self._owners.get(digest, min_version)
        return version, name or ""

    async def _read_customers(self, names: Sequence[str], min_version: int) -> tuple[int, dict[str, Customer]]:
        rows = await self._database.read(_CUSTOMERS, min_version, {_NAMES: padded(names)})
        return rows[0]["read_version"], {row["name"]: customer_of(row) for row in rows if row["id"] is not None}

    async def _read_owners(self, digests: Sequence[str], min_version: int) -> tuple[int, dict[str, str]]:
        rows = await self._database.read(_OWNERS, min_version, {_NAMES: padded(digests)})
        return rows[0]["read_version"], {row["digest"]: row["customer_name"] for row in rows if row["digest"] is not None}


def padded(names: Sequence[str]) -> list[str]:
    """Names padded to a power of two, so that the driver prepares ten statements and not five hundred."""
    return [*names, *[names[-1]] * ((1 << (len(names) - 1).bit_length()) - len(names))]


def customer_of(row: Mapping[Any, Any], *, with_metadata: bool = False) -> Customer:
    """The customer in a row of `customers`, with the name of its tier as `tier_name`."""
    return Customer(
        name=row["name"],
        external_id=row["external_id"] or "",
        tier=row["tier_name"] or "",
        anchor=row["anchor"],
        timezone=row["timezone"],
        metadata=row["metadata"] if with_metadata else "",
        match=tuple(sorted((name, tuple(values)) for name, values in (row["match_attributes"] or {}).items())),
        overrides=overrides_of(row["overrides"]),
        managed_by_file=row["managed_by_file"],
    )


def row_of_customer(customer: Customer, tier_id: int | None) -> dict[str, Any]:
    """The values of a customer's row, without its id and the time at which it was made."""
    return {
        "name": customer.name,
        "external_id": customer.external_id or None,
        "tier_id": tier_id,
        "anchor": customer.anchor,
        "timezone": customer.timezone,
        "metadata": customer.metadata,
        "match_attributes": {name: list(values) for name, values in customer.match} or None,
        "overrides": override_rows(customer.overrides),
        "managed_by_file": customer.managed_by_file,
    }


def digests_of(row: Mapping[Any, Any]) -> dict[str, str]:
    """The attribute of each value of a customer's row, by the digest of the value."""
    matched = row["match_attributes"] or {}
    return {value_digest(name, value): name for name, values in matched.items() for value in values}


async def write_customers(
    writing: WriteTransaction,
    inserted: Sequence[Mapping[str, Any]],
    changed: Sequence[tuple[Mapping[Any, Any], Mapping[str, Any]]],
    deleted: Sequence[Mapping[Any, Any]],
) -> None:
    """Write rows of customers, their values, and the tiers of their keys.

    Args:
        inserted: values of new rows.
        changed: rows as they are, and all their values after the change.
        deleted: rows as they are; nothing must belong to them.

    Raises:
        CatalogError: if an external id or a value belongs to another customer; the transaction must be rolled back then.
    """
    connection = writing.connection
    for each in (*inserted, *(row for row, _ in changed), *deleted):
        writing.touch(CUSTOMER, each["name"])
    before = [digests_of(row) for row in (*(row for row, _ in changed), *deleted)]
    after = [digests_of(row) for row in (*inserted, *(values for _, values in changed))]
    touched = {digest for digests in (*before, *after) for digest in digests}
    for digest in touched:
        writing.touch(CUSTOMER_VALUE, digest)
    gone = [row["id"] for row, _ in changed] + [row["id"] for row in deleted]
    if touched:
        for batch in batches(gone):
            await connection.execute(delete(customer_values).where(customer_values.c.customer_id.in_(batch)))
    await delete_rows(connection, customers, [row["id"] for row in deleted])
    await _require_free_ids(connection, inserted, changed)
    await update_rows(connection, customers, [{**values, "id": row["id"]} for row, values in changed], _WRITTEN)
    await insert_rows(connection, customers, [{**values, "created_at_us": now_us()} for values in inserted])
    await _insert_values(connection, [values for values in inserted if values["match_attributes"]], changed)
    for row, values in changed:
        if values["tier_id"] is not None and values["tier_id"] != row["tier_id"]:
            inheriting = (api_keys.c.customer_id == row["id"], api_keys.c.inherits_tier)
            # For lists by tier, and for older instances: this version reads the customer's tier.
            await connection.execute(update(api_keys).where(*inheriting).values(tier_id=values["tier_id"]))
    if touched:
        names = (await connection.execute(select(customer_values.c.attribute).distinct())).scalars().all()
        await connection.execute(update(policy_state).values(customer_attributes=sorted(names) or None))
        writing.touch(ANONYMOUS)


async def _require_free_ids(
    connection: AsyncConnection,
    inserted: Sequence[Mapping[str, Any]],
    changed: Sequence[tuple[Mapping[Any, Any], Mapping[str, Any]]],
) -> None:
    wanted: dict[str, str] = {}
    for values in (*inserted, *(after for _, after in changed)):
        if values["external_id"] is not None:
            if values["external_id"] in wanted:
                raise _taken(f"external_id {values['external_id'][:60]!r}", wanted[values["external_id"]])
            wanted[values["external_id"]] = values["name"]
    changing = {row["name"] for row, _ in changed}
    for batch in batches(list(wanted)):
        query = select(customers.c.external_id, customers.c.name).where(customers.c.external_id.in_(batch))
        for row in await connection.execute(query):
            if row.name not in changing and row.name != wanted[row.external_id]:
                raise _taken(f"external_id {row.external_id[:60]!r}", row.name)
    # So that two customers can exchange theirs.
    for batch in batches([row["id"] for row, values in changed if row["external_id"] != values["external_id"]]):
        await connection.execute(update(customers).where(customers.c.id.in_(batch)).values(external_id=None))


async def _insert_values(
    connection: AsyncConnection,
    inserted: Sequence[Mapping[str, Any]],
    changed: Sequence[tuple[Mapping[Any, Any], Mapping[str, Any]]],
) -> None:
    owners: dict[str, tuple[str, str]] = {}
    for values in (*inserted, *(after for _, after in changed)):
        for digest, attribute in digests_of(values).items():
            if digest in owners:
                raise _taken(f"a value of {attribute}", owners[digest][0])
            owners[digest] = (values["name"], attribute)
    for batch in batches(list(owners)):
        query = select(customer_values.c.digest, customers.c.name).join(
            customers, customers.c.id == customer_values.c.customer_id
        )
        taken = (await connection.execute(query.where(customer_values.c.digest.in_(batch)).limit(1))).first()
        if taken is not None:
            raise _taken(f"a value of {owners[taken.digest][1]}", taken.name)
    ids = await customer_ids(connection, {name for name, _ in owners.values()})
    rows = [{"digest": digest, "customer_id": ids[name], "attribute": attribute} for digest, (name, attribute) in owners.items()]
    await insert_rows(connection, customer_values, rows)


async def customer_ids(connection: AsyncConnection, names: Collection[str]) -> dict[str, int]:
    """The ids of the customers that exist, by name."""
    found: dict[str, int] = {}
    for batch in batches(list(names)):
        query = select(customers.c.name, customers.c.id).where(customers.c.name.in_(batch))
        found |= {row.name: row.id for row in await connection.execute(query)}
    return found


async def apply_customers(writing: WriteTransaction, wanted: Iterable[Customer], not_owned: str) -> None:
    """Update the customers that the policy file owns to match it; their keys must be in it or be gone.

    Raises:
        CatalogError: if the file contradicts rows that it does not own.
    """
    connection = writing.connection
    desired = {customer.name: customer for customer in wanted}
    owned = {
        row["name"]: row for row in (await connection.execute(select(customers).where(customers.c.managed_by_file))).mappings()
    }
    tier_ids = {row.name: row.id for row in await connection.execute(select(tiers.c.id, tiers.c.name))}
    unclaimed = await customer_ids(connection, [name for name in desired if name not in owned])
    if unclaimed:
        raise CatalogError(
            f"customer {min(unclaimed)!r} of the policy file {not_owned}: rename one of the two, or delete the other"
        )
    inserted, changed = [], []
    for name, customer in desired.items():
        values = row_of_customer(customer, tier_ids[customer.tier] if customer.tier else None)
        row = owned.get(name)
        if row is None:
            inserted.append(values)
        elif any(row[column] != value for column, value in values.items()):
            changed.append((row, {**values, "revision": row["revision"] + 1}))
    await write_customers(writing, inserted, changed, [])


async def drop_customers(writing: WriteTransaction, wanted: Iterable[Customer]) -> None:
    """Delete the customers that the policy file owned and no longer names; after its keys were updated.

    Raises:
        CatalogError: if one has API keys that the file does not own.
    """
    kept = {customer.name for customer in wanted}
    connection = writing.connection
    rows = (await connection.execute(select(customers).where(customers.c.managed_by_file))).mappings().all()
    gone = [row for row in rows if row["name"] not in kept]
    for row in gone:
        user = (await connection.execute(select(api_keys.c.id).where(api_keys.c.customer_id == row["id"]).limit(1))).scalar()
        if user is not None:
            raise CatalogError(
                f"customer {row['name']!r} was removed from the policy file, but other API keys still belong to it, e.g. {user}: "
                "keep the customer, or move or delete those keys first"
            )
    if gone:
        await write_customers(writing, [], [], gone)


def _taken(what: str, owner: str) -> CatalogError:
    return CatalogError(f"{what} belongs to the customer {owner!r} already: remove it there first")
