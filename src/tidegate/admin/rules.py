"""Changes of tiers and rules by operators, each in one transaction with its row in the audit log.

A change contains the revision that was read, and is rejected if the row has another one. Changes of rows of the policy file are
rejected, because the file would overwrite them. `api_keys` does the same for API keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import Any, Final

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tidegate.admin.models import JsonObject, RuleRead, TierRead
from tidegate.admin.transaction import (
    AuditedTransaction,
    ExpectedRevisions,
    insert_rule,
    insert_tier,
    load_editable_rule_row,
    load_editable_tier_row,
    load_tier_row,
    remove_rule,
    rule_rows,
    update_rule,
    update_tier,
)
from tidegate.catalog.changes import NONE, TIER, Item
from tidegate.catalog.sql import rows as policy_rows
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.tables import api_keys, customers, policy_state, rate_limit_rules, tiers
from tidegate.errors import CatalogError
from tidegate.policy.coverage import coverage_warnings
from tidegate.policy.model import Tier
from tidegate.policy.rules import Rule

FAILURE_FIELDS: Final = ("count", "statuses", "clear_on_success", "penalty")
RULE_FIELDS: Final = {
    "endpoint",
    "limits",
    "methods",
    "algorithm",
    "subject",
    "priority",
    "mode",
    "on_failure",
    "name",
    "match",
    "on_missing",
    "quotas",
    "overage",
    "leases",
    "action",
    *FAILURE_FIELDS,
}


class CatalogEditor:
    """Changes of a catalog by operators. Concurrent changes run one after another.

    Every change raises `NotFound` if its tier or rule does not exist, `StaleRevision` if its revision is not an expected one,
    `ManagedByFile` if the policy file owns it, `PolicyError` if a value is not valid, and `CatalogUnavailable` if the database
    does not answer. Nothing is changed then.

    Args:
        on_change: callback run with the new version and the touched items after each change; must not raise.
    """

    def __init__(self, catalog: SqlCatalog, on_change: Callable[[int, Collection[Item]], None]) -> None:
        self.catalog = catalog
        self._on_change = on_change
        # One text is parsed at a time: parsing takes up to 160 times its size in memory.
        self.parsing = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def changing(self, actor: str) -> AsyncIterator[AuditedTransaction]:
        """A transaction that raises the version; an exception rolls it back.

        Raises:
            CatalogUnavailable: if the database rejects it.
        """
        async with self.catalog.database.changing_as(functools.partial(AuditedTransaction, actor)) as transaction:
            # In the same transaction: a file may be applied or released at any time.
            digest = (await transaction.connection.execute(select(policy_state.c.file_digest))).scalar()
            transaction.has_file = digest is not None
            yield transaction
        self._on_change(transaction.version, transaction.items)

    def reading(self) -> contextlib.AbstractAsyncContextManager[AsyncConnection]:
        """See `Database.reading`."""
        return self.catalog.database.reading()

    async def record(self, actor: str, action: str, kind: str, target: str, after: JsonObject | None = None) -> None:
        """Write an operation outside of the catalog to the audit log, such as a reset of counters.

        Raises:
            CatalogUnavailable: if the database rejects it.
        """
        async with self.changing(actor) as transaction:
            transaction.touch(NONE)
            await transaction.audit(action, kind, target, None, after)

    async def create_tier(
        self, actor: str, name: str, limits: Collection[str], quotas: Collection[str] = (), overage: object = None
    ) -> TierRead:
        """Create a tier without rules.

        Args:
            name: 1 to 64 of letters, digits, '_', '.', '-'.
            overage: as `Overage.parse` reads it.

        Raises:
            CatalogError: if the tier exists.
        """
        tier = Tier.make(name, (), limits, quotas, overage)
        async with self.changing(actor) as transaction:
            return await insert_tier(transaction, tier)

    async def edit_tier(
        self,
        actor: str,
        name: str,
        limits: Collection[str] | None,
        expected_revisions: ExpectedRevisions,
        quotas: Collection[str] | None = None,
        overage: object = None,
    ) -> TierRead:
        """Change the limits and quotas of a tier.

        Args:
            limits: None to keep them; so are all others.
            overage: as `Overage.parse` reads it.
        """
        given = {"limits": limits, "quotas": quotas, "overage": overage}
        fields = {field: value for field, value in given.items() if value is not None}
        async with self.changing(actor) as transaction:
            row = await load_editable_tier_row(transaction, name, expected_revisions)
            current = TierRead.of_row(row).model_dump(include={"limits", "quotas", "overage"})
            return await update_tier(transaction, row, Tier.make(row["name"], **{**current, **fields}))

    async def delete_tier(self, actor: str, name: str, expected_revisions: ExpectedRevisions) -> None:
        """Delete a tier with its rules.

        Raises:
            CatalogError: if it has API keys, or is the anonymous tier.
        """
        async with self.changing(actor) as transaction:
            row = await load_editable_tier_row(transaction, name, expected_revisions)
            user = await transaction.one(select(api_keys.c.id).where(api_keys.c.tier_id == row["id"]).limit(1))
            if user is not None:
                raise CatalogError(
                    f"tier {name!r} has API keys, e.g. {user['id']}: move them to another tier, or revoke and delete them first"
                )
            owner = await transaction.one(select(customers.c.name).where(customers.c.tier_id == row["id"]).limit(1))
            if owner is not None:
                raise CatalogError(
                    f"tier {name!r} is the tier of customers, e.g. {owner['name']!r}: give them another tier first"
                )
            state = await transaction.one(select(policy_state.c.anonymous_tier, policy_state.c.callers))
            if state is not None and state["anonymous_tier"] == row["name"]:
                raise CatalogError(f"tier {name!r} is the anonymous tier: name another one in [anonymous] of a policy first")
            if state is not None and (state["callers"] or {}).get("default_tier") == row["name"]:
                raise CatalogError(f"tier {name!r} is the default_tier of [callers]: name another one in a policy first")
            rules = (await transaction.connection.execute(rule_rows().where(tiers.c.id == row["id"]))).mappings().all()
            await transaction.audit_all(
                [
                    {
                        "action": "delete",
                        "kind": "rule",
                        "target": str(rule["id"]),
                        "before": RuleRead.of_row(rule).audited(),
                        "after": None,
                    }
                    for rule in rules
                ]
            )
            await transaction.connection.execute(delete(rate_limit_rules).where(rate_limit_rules.c.tier_id == row["id"]))
            transaction.touch(TIER, row["name"])
            await transaction.connection.execute(delete(tiers).where(tiers.c.id == row["id"]))
            await transaction.audit("delete", "tier", row["name"], TierRead.of_row(row), None)

    async def create_rule(self, actor: str, tier: str, fields: Mapping[str, Any]) -> RuleRead:
        """Add a rule to a tier, which may be one of the policy file.

        Args:
            fields: arguments of `Rule.make`.

        Raises:
            CatalogError: if the tier has a rule with this name, or too many rules.
        """
        rule = Rule.make(**fields)
        async with self.changing(actor) as transaction:
            created = await insert_rule(transaction, await load_tier_row(transaction, tier), rule)
        return created.model_copy(update={"warnings": await self._warnings(tier, created.id)})

    async def edit_rule(
        self, actor: str, rule_id: int, fields: Mapping[str, Any], expected_revisions: ExpectedRevisions, *, replace: bool = False
    ) -> RuleRead:
        """Change a rule. A default name, derived from methods and endpoint, is derived again.

        Args:
            fields: arguments of `Rule.make`; omitted ones keep their values.
            replace: whether omitted fields get their defaults instead.

        Raises:
            CatalogError: if the tier has another rule with this name.
        """
        async with self.changing(actor) as transaction:
            row = await load_editable_rule_row(transaction, rule_id, expected_revisions)
            current = {} if replace else RuleRead.of_row(row).model_dump(include=RULE_FIELDS)
            if fields.get("count") == "requests":
                current = {field: value for field, value in current.items() if field not in FAILURE_FIELDS}
            if current and Rule.make(**{**current, "name": "any"}).default_name == row["name"]:
                current["name"] = ""
            changed = await update_rule(transaction, row, Rule.make(**{**current, **fields}))
        return changed.model_copy(update={"warnings": await self._warnings(row["tier_name"], rule_id)})

    async def delete_rule(self, actor: str, rule_id: int, expected_revisions: ExpectedRevisions) -> None:
        """Delete a rule."""
        async with self.changing(actor) as transaction:
            row = await load_editable_rule_row(transaction, rule_id, expected_revisions)
            await remove_rule(transaction, row)

    async def _warnings(self, tier: str, rule_id: int) -> list[str]:
        """Warnings about rules of a tier that overlap; computed in a thread and without the write lock."""
        ordered = rule_rows().where(tiers.c.name == tier).order_by(rate_limit_rules.c.position, rate_limit_rules.c.id)
        async with self.reading() as connection:
            rows = (await connection.execute(ordered)).mappings().all()
        name = next((row["name"] for row in rows if row["id"] == rule_id), "")
        return await asyncio.to_thread(lambda: coverage_warnings(tier, [policy_rows.rule_of(row) for row in rows], name))
