"""The transaction of one change by an operator, with its audit log, and the rows of tiers and rules in it.

`rules` contains the operations; this module reads and writes their rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final, TypeAlias

from sqlalchemy import RowMapping, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tidegate.admin.models import JsonObject, Resource, Row, RuleRead, TierRead
from tidegate.catalog.changes import TIER
from tidegate.catalog.sql import rows as policy_rows
from tidegate.catalog.sql.bulk import insert_rows
from tidegate.catalog.sql.change_log import WriteTransaction
from tidegate.catalog.sql.tables import audit_log, rate_limit_rules, tiers
from tidegate.errors import CatalogError
from tidegate.policy.model import Tier
from tidegate.policy.rules import Rule
from tidegate.timestamps import now_us

MAX_RULES: Final = 10_000
"""Maximum number of rules of a tier."""

ExpectedRevisions: TypeAlias = Collection[int] | None
"""Accepted revisions of the row to change; another one means that it was changed concurrently. None accepts any."""
Audited: TypeAlias = Resource | JsonObject | None
"""A row before or after a change; None if there is none."""


class NotFound(CatalogError):
    """The resource does not exist."""

    code = "NOT_FOUND"
    status = 404


class StaleRevision(CatalogError):
    """The row was changed since it was read; the change was rejected."""

    code = "REVISION_STALE"
    status = 412


class ManagedByFile(CatalogError):
    """The policy file owns the row, so it must be changed there."""

    code = "MANAGED_BY_FILE"


class AuditedTransaction(WriteTransaction):
    """A transaction of one operator that writes the audit log."""

    def __init__(self, actor: str, connection: AsyncConnection, version: int, previous: int) -> None:
        super().__init__(connection, version, previous)
        self.actor = actor
        # Without a policy file, operators own the rows that a former file created.
        self.has_file = True

    def is_of_file(self, row: Row) -> bool:
        """Whether the policy file owns a row."""
        return self.has_file and bool(row["managed_by_file"])

    async def audit(self, action: str, kind: str, target: str, before: Audited, after: Audited) -> None:
        """Write a change to the audit log, in the same transaction."""
        row = {"at_us": now_us(), "actor": self.actor, "action": action, "kind": kind, "target": target}
        await self.connection.execute(insert(audit_log).values(**row, before=audited(before), after=audited(after)))

    async def audit_all(self, changes: Sequence[JsonObject]) -> None:
        """Write many changes to the audit log.

        Args:
            changes: the arguments of `audit` by name.
        """
        common = {"at_us": now_us(), "actor": self.actor}
        await insert_rows(self.connection, audit_log, [{**common, **each} for each in changes])

    async def one(self, query: Any) -> RowMapping | None:
        """The first row of a query."""
        return (await self.connection.execute(query)).mappings().first()


def require_editable(transaction: AuditedTransaction, row: Row, expected_revisions: ExpectedRevisions, what: str) -> None:
    """Reject the change of a row that the policy file owns, or that was changed since it was read.

    Raises:
        ManagedByFile: if the file owns it.
        StaleRevision: if its revision is not expected.
    """
    if transaction.is_of_file(row):
        raise ManagedByFile(
            f"{what} is in the policy file: change it there; if the file was deleted, restart 'tidegate serve' without it, "
            "which releases its rows"
        )
    if expected_revisions is not None and row["revision"] not in expected_revisions:
        raise StaleRevision(
            f"{what} was changed meanwhile and has revision {row['revision']} now: read it again, then repeat the change",
            revision=row["revision"],
        )


async def load_tier_row(transaction: AuditedTransaction, name: str) -> RowMapping:
    """The row of a tier.

    Raises:
        NotFound: with the names of existing tiers.
    """
    row = await transaction.one(select(tiers).where(tiers.c.name == name))
    if row is None:
        names = (await transaction.connection.execute(select(tiers.c.name).order_by(tiers.c.name).limit(20))).scalars().all()
        raise NotFound(f"there is no tier {name[:64]!r}: there are {', '.join(names) or 'none yet; make one first'}")
    return row


async def load_rule_row(transaction: AuditedTransaction, rule_id: int) -> RowMapping:
    """The row of a rule, with its tier's name.

    Raises:
        NotFound: if it does not exist.
    """
    row = await transaction.one(rule_rows().where(rate_limit_rules.c.id == rule_id))
    if row is None:
        raise NotFound(f"there is no rule {rule_id}: see GET /admin/v1/rate-limit-rules")
    return row


async def load_editable_tier_row(transaction: AuditedTransaction, name: str, expected_revisions: ExpectedRevisions) -> RowMapping:
    """`load_tier_row` and `require_editable`."""
    row = await load_tier_row(transaction, name)
    require_editable(transaction, row, expected_revisions, f"tier {name!r}")
    return row


async def load_editable_rule_row(
    transaction: AuditedTransaction, rule_id: int, expected_revisions: ExpectedRevisions
) -> RowMapping:
    """`load_rule_row` and `require_editable`."""
    row = await load_rule_row(transaction, rule_id)
    require_editable(transaction, row, expected_revisions, f"rule {rule_id}")
    return row


async def insert_tier(transaction: AuditedTransaction, tier: Tier) -> TierRead:
    """Insert a tier's row, without rules.

    Raises:
        CatalogError: if the tier exists.
    """
    if await transaction.one(select(tiers.c.id).where(tiers.c.name == tier.name)) is not None:
        raise CatalogError(f"there is a tier {tier.name!r} already: change it, or choose another name")
    transaction.touch(TIER, tier.name)
    values = {**policy_rows.row_of_tier(tier), "managed_by_file": False}
    await transaction.connection.execute(insert(tiers).values(values))
    created = TierRead.of_row(await load_tier_row(transaction, tier.name))
    await transaction.audit("create", "tier", tier.name, None, created)
    return created


async def update_tier(transaction: AuditedTransaction, row: RowMapping, tier: Tier) -> TierRead:
    """Update the limits and quotas of a tier's row."""
    transaction.touch(TIER, row["name"])
    values = {**policy_rows.row_of_tier(tier), "managed_by_file": False, "revision": row["revision"] + 1}
    await transaction.connection.execute(update(tiers).where(tiers.c.id == row["id"]).values(values))
    changed = TierRead.of_row({**row, **values})
    await transaction.audit("update", "tier", row["name"], TierRead.of_row(row), changed)
    return changed


async def insert_rule(transaction: AuditedTransaction, tier: RowMapping, rule: Rule) -> RuleRead:
    """Insert a rule's row after the others of its tier.

    Raises:
        CatalogError: if the tier has a rule of that name, or too many.
    """
    own = select(func.count(), func.max(rate_limit_rules.c.position)).where(rate_limit_rules.c.tier_id == tier["id"])
    count, last = (await transaction.connection.execute(own)).one()
    if count >= MAX_RULES:
        raise CatalogError(f"tier {tier['name']!r} has {count} rules: at most {MAX_RULES} are kept; remove some first")
    await _require_free_name(transaction, tier["id"], tier["name"], rule.name, None)
    transaction.touch(TIER, tier["name"])
    values = policy_rows.row_of_rule(rule, tier["id"], 0 if last is None else last + 1)
    statement = insert(rate_limit_rules).values({**values, "managed_by_file": False}).returning(rate_limit_rules.c.id)
    rule_id = (await transaction.connection.execute(statement)).scalar_one()
    created = RuleRead.of_row(await load_rule_row(transaction, rule_id))
    await transaction.audit("create", "rule", str(rule_id), None, created)
    return created


async def update_rule(transaction: AuditedTransaction, row: RowMapping, rule: Rule) -> RuleRead:
    """Update the row of a rule.

    Raises:
        CatalogError: if the tier has another rule of that name.
    """
    await _require_free_name(transaction, row["tier_id"], row["tier_name"], rule.name, row["id"])
    transaction.touch(TIER, row["tier_name"])
    values = policy_rows.row_of_rule(rule, row["tier_id"], row["position"])
    values |= {"managed_by_file": False, "revision": row["revision"] + 1}
    await transaction.connection.execute(update(rate_limit_rules).where(rate_limit_rules.c.id == row["id"]).values(values))
    changed = RuleRead.of_row({**row, **values})
    await transaction.audit("update", "rule", str(row["id"]), RuleRead.of_row(row), changed)
    return changed


async def remove_rule(transaction: AuditedTransaction, row: RowMapping) -> None:
    """Delete a rule's row."""
    transaction.touch(TIER, row["tier_name"])
    await transaction.connection.execute(delete(rate_limit_rules).where(rate_limit_rules.c.id == row["id"]))
    await transaction.audit("delete", "rule", str(row["id"]), RuleRead.of_row(row), None)


def rule_rows() -> Any:
    """A query for rules with the names of their tiers, unordered."""
    return select(rate_limit_rules, tiers.c.name.label("tier_name")).join(tiers, tiers.c.id == rate_limit_rules.c.tier_id)


async def _require_free_name(transaction: AuditedTransaction, tier_id: int, tier: str, name: str, own: int | None) -> None:
    query = select(rate_limit_rules.c.id).where(rate_limit_rules.c.tier_id == tier_id, rate_limit_rules.c.name == name)
    other = await transaction.one(query)
    if other is not None and other["id"] != own:
        raise CatalogError(
            f"tier {tier!r} has a rule {name!r} already, with id {other['id']}: change that one, or give this one another name"
        )


def audited(state: Audited) -> JsonObject | None:
    """The fields of a row that are written to the audit log."""
    return state.audited() if isinstance(state, Resource) else state
