"""One change of the catalog by an operator: its transaction, its row in the audit log, and the rows of tiers and rules.

`editing` says what an operator may ask for; here is how it is done to a row that was found and may be changed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, TypeAlias

from sqlalchemy import RowMapping, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tidegate.admin.records import Form, rule_form, tier_form
from tidegate.catalog.changes import TIER
from tidegate.catalog.sql import rows as policy_rows
from tidegate.catalog.sql.bulk import insert_rows
from tidegate.catalog.sql.change_log import WriteTransaction
from tidegate.catalog.sql.tables import audit_log, rate_limit_rules, tiers
from tidegate.errors import CatalogError
from tidegate.policy.model import Rule, Tier
from tidegate.timestamps import now_us

MAX_RULES: Final = 10_000
"""Most rules of one tier that can be made here."""

Seen: TypeAlias = Collection[int] | None
"""The revisions that whoever asks for a change has seen; None for any."""


class NotThere(CatalogError):
    """What is to be changed or shown is not there."""

    code = "NOT_FOUND"
    status = 404


class StaleRevision(CatalogError):
    """The row was changed since it was read; nothing was changed now."""

    code = "REVISION_STALE"
    status = 412


class ManagedByFile(CatalogError):
    """The policy file owns the row: it is changed there."""

    code = "MANAGED_BY_FILE"


class AuditedTransaction:
    """One transaction of one operator.

    Args:
        writing: the transaction, which has its turn among all writers.
        actor: whose change it is, for the audit log.
        has_file: whether a policy file is active; without one nobody but operators can change the rows that it made.
    """

    def __init__(self, writing: WriteTransaction, actor: str, has_file: bool = True) -> None:
        self.writing = writing
        self.connection: AsyncConnection = writing.connection
        self.actor = actor
        self.has_file = has_file

    def is_of_file(self, row: Mapping[Any, Any]) -> bool:
        """Whether the policy file owns a row, so that it is changed there.

        Args:
            row: any with `managed_by_file`.
        """
        return self.has_file and bool(row["managed_by_file"])

    def touch(self, kind: str, name: str = "") -> None:
        """See `WriteTransaction.touch`."""
        self.writing.touch(kind, name)

    async def audit(self, action: str, kind: str, target: str, before: Form | None, after: Form | None) -> None:
        """Write down what is changed, in the same transaction.

        Args:
            action: such as create, update, delete.
            kind: such as tier, rule, api_key.
            target: name or id of what is changed.
            before: how it was; None where it was not there.
            after: how it is; None where it is gone.
        """
        row = {"at_us": now_us(), "actor": self.actor, "action": action, "kind": kind, "target": target}
        await self.connection.execute(insert(audit_log).values(**row, before=before, after=after))

    async def audit_all(self, changes: Sequence[Form]) -> None:
        """Write down many changes at once.

        Args:
            changes: each with the arguments of `audit` by name.
        """
        common = {"at_us": now_us(), "actor": self.actor}
        await insert_rows(self.connection, audit_log, [{**common, **each} for each in changes])

    async def one(self, query: Any) -> RowMapping | None:
        """The first row of a query.

        Args:
            query: a select.

        Returns:
            The row, or None.
        """
        return (await self.connection.execute(query)).mappings().first()


def require_editable(change: AuditedTransaction, row: Mapping[Any, Any], seen: Seen, what: str) -> None:
    """Refuse a change of a row that the policy file owns, or that was changed since it was read.

    Args:
        change: the transaction.
        row: any with `managed_by_file` and `revision`.
        seen: revisions of which one must be in force.
        what: names the row in the message.

    Raises:
        ManagedByFile: if the file owns it.
        StaleRevision: if its revision is another one.
    """
    if change.is_of_file(row):
        raise ManagedByFile(
            f"{what} is in the policy file: change it there; if the file is gone, restart 'tidegate serve' without it, "
            "which releases what the file made"
        )
    if seen is not None and row["revision"] not in seen:
        raise StaleRevision(
            f"{what} was changed meanwhile and has revision {row['revision']} now: read it again, then repeat the change",
            revision=row["revision"],
        )


async def load_tier_row(change: AuditedTransaction, name: str) -> RowMapping:
    """The row of a tier.

    Args:
        change: the transaction.
        name: of the tier.

    Returns:
        The row.

    Raises:
        NotThere: naming the tiers there are.
    """
    row = await change.one(select(tiers).where(tiers.c.name == name))
    if row is None:
        names = (await change.connection.execute(select(tiers.c.name).order_by(tiers.c.name).limit(20))).scalars().all()
        raise NotThere(f"there is no tier {name[:64]!r}: there are {', '.join(names) or 'none yet; make one first'}")
    return row


async def load_rule_row(change: AuditedTransaction, rule_id: int) -> RowMapping:
    """The row of a rule, with its tier's name.

    Args:
        change: the transaction.
        rule_id: its id.

    Returns:
        The row.

    Raises:
        NotThere: if there is none.
    """
    row = await change.one(rule_rows().where(rate_limit_rules.c.id == rule_id))
    if row is None:
        raise NotThere(f"there is no rule {rule_id}: see GET /admin/v1/rate-limit-rules")
    return row


async def insert_tier(change: AuditedTransaction, tier: Tier) -> Form:
    """Make a tier's row; its rules are made one by one.

    Args:
        change: the transaction.
        tier: the tier.

    Returns:
        The tier's form.

    Raises:
        CatalogError: if there is such a tier.
    """
    if await change.one(select(tiers.c.id).where(tiers.c.name == tier.name)) is not None:
        raise CatalogError(f"there is a tier {tier.name!r} already: change it, or take another name")
    change.touch(TIER, tier.name)
    values = {**policy_rows.row_of_tier(tier), "managed_by_file": False}
    await change.connection.execute(insert(tiers).values(values))
    form = tier_form(await load_tier_row(change, tier.name))
    await change.audit("create", "tier", tier.name, None, form)
    return form


async def update_tier(change: AuditedTransaction, row: RowMapping, tier: Tier) -> Form:
    """Give a tier's row other limits.

    Args:
        change: the transaction.
        row: the tier's row.
        tier: how it is to be.

    Returns:
        The tier's form.
    """
    change.touch(TIER, row["name"])
    values = {"limits": [limit.text for limit in tier.limits], "managed_by_file": False, "revision": row["revision"] + 1}
    await change.connection.execute(update(tiers).where(tiers.c.id == row["id"]).values(values))
    form = tier_form({**row, **values})
    await change.audit("update", "tier", row["name"], tier_form(row), form)
    return form


async def insert_rule(change: AuditedTransaction, tier: RowMapping, rule: Rule) -> Form:
    """Make a rule's row, behind the others of its tier.

    Args:
        change: the transaction.
        tier: the tier's row.
        rule: the rule.

    Returns:
        The rule's form.

    Raises:
        CatalogError: if the tier has a rule of that name, or too many.
    """
    own = select(func.count(), func.max(rate_limit_rules.c.position)).where(rate_limit_rules.c.tier_id == tier["id"])
    count, last = (await change.connection.execute(own)).one()
    if count >= MAX_RULES:
        raise CatalogError(f"tier {tier['name']!r} has {count} rules: at most {MAX_RULES} are kept; remove some first")
    await _require_free_name(change, tier["id"], tier["name"], rule.name, None)
    change.touch(TIER, tier["name"])
    values = policy_rows.row_of_rule(rule, tier["id"], 0 if last is None else last + 1)
    made = insert(rate_limit_rules).values({**values, "managed_by_file": False}).returning(rate_limit_rules.c.id)
    rule_id = (await change.connection.execute(made)).scalar_one()
    form = rule_form(await load_rule_row(change, rule_id))
    await change.audit("create", "rule", str(rule_id), None, form)
    return form


async def update_rule(change: AuditedTransaction, row: RowMapping, rule: Rule) -> Form:
    """Write a rule over its row.

    Args:
        change: the transaction.
        row: the rule's row.
        rule: how it is to be.

    Returns:
        The rule's form.

    Raises:
        CatalogError: if the tier has another rule of that name.
    """
    await _require_free_name(change, row["tier_id"], row["tier_name"], rule.name, row["id"])
    change.touch(TIER, row["tier_name"])
    values = policy_rows.row_of_rule(rule, row["tier_id"], row["position"])
    values |= {"managed_by_file": False, "revision": row["revision"] + 1}
    await change.connection.execute(update(rate_limit_rules).where(rate_limit_rules.c.id == row["id"]).values(values))
    form = rule_form({**row, **values})
    await change.audit("update", "rule", str(row["id"]), rule_form(row), form)
    return form


async def remove_rule(change: AuditedTransaction, row: RowMapping) -> None:
    """Delete a rule's row.

    Args:
        change: the transaction.
        row: the rule's row.
    """
    change.touch(TIER, row["tier_name"])
    await change.connection.execute(delete(rate_limit_rules).where(rate_limit_rules.c.id == row["id"]))
    await change.audit("delete", "rule", str(row["id"]), rule_form(row), None)


def rule_rows() -> Any:
    """A select of rules with their tiers' names, without order.

    Returns:
        The query.
    """
    return select(rate_limit_rules, tiers.c.name.label("tier_name")).join(tiers, tiers.c.id == rate_limit_rules.c.tier_id)


async def _require_free_name(change: AuditedTransaction, tier_id: int, tier: str, name: str, own: int | None) -> None:
    query = select(rate_limit_rules.c.id).where(rate_limit_rules.c.tier_id == tier_id, rate_limit_rules.c.name == name)
    other = await change.one(query)
    if other is not None and other["id"] != own:
        raise CatalogError(
            f"tier {tier!r} has a rule {name!r} already, with id {other['id']}: change that one, or give this one another name"
        )
