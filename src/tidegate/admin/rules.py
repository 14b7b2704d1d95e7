"""Every change that operators make to tiers and rules, each in one transaction with its row in the audit log.

A change says which revision of a row it saw, and is refused where that is not the one in force. Rows of the policy file are
refused: the file would write over them. What is refused changes nothing. `editing_keys` does the same for API keys.
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
    load_rule_row,
    load_tier_row,
    remove_rule,
    require_editable,
    rule_rows,
    update_rule,
    update_tier,
)
from tidegate.catalog.changes import NONE, TIER, Item
from tidegate.catalog.sql import rows as policy_rows
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.tables import api_keys, policy_state, rate_limit_rules, tiers
from tidegate.errors import CatalogError
from tidegate.policy.coverage import coverage_warnings
from tidegate.policy.model import Rule, Tier

RULE_FIELDS: Final = {"endpoint", "limits", "methods", "algorithm", "subject", "priority", "mode", "on_failure", "name"}


class CatalogEditor:
    """Changes to a catalog by operators. Any number of tasks may change at once: they take turns.

    Args:
        on_change: is told the new version and what was touched after each change, synchronously; must not raise.
    """

    def __init__(self, catalog: SqlCatalog, on_change: Callable[[int, Collection[Item]], None]) -> None:
        self.catalog = catalog
        self._on_change = on_change

    @contextlib.asynccontextmanager
    async def changing(self, actor: str) -> AsyncIterator[AuditedTransaction]:
        """A transaction that raises the version; whoever leaves it by an exception has changed nothing.

        Raises:
            CatalogUnavailable: if the database does not take it.
        """
        async with self.catalog.database.changing_as(functools.partial(AuditedTransaction, actor)) as transaction:
            # In the same transaction: a file may be applied or released at any time.
            digest = (await transaction.connection.execute(select(policy_state.c.file_digest))).scalar()
            transaction.has_file = digest is not None
            yield transaction
        self._on_change(transaction.version, transaction.items)

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A connection to read from.

        Raises:
            CatalogUnavailable: if the database does not answer.
        """
        async with self.catalog.database.reading() as connection:
            yield connection

    async def record(self, actor: str, action: str, kind: str, target: str, after: JsonObject | None = None) -> None:
        """Write down what was done to something that the catalog does not hold, such as a counter.

        Raises:
            CatalogUnavailable: if the database does not take it.
        """
        async with self.changing(actor) as transaction:
            transaction.touch(NONE)
            await transaction.audit(action, kind, target, None, after)

    async def create_tier(self, actor: str, name: str, limits: Collection[str]) -> TierRead:
        """Make a tier without rules.

        Args:
            name: 1 to 64 of letters, digits, '_', '.', '-'.

        Raises:
            PolicyError: if the name or a limit is refused.
            CatalogError: if there is such a tier.
            CatalogUnavailable: if the database does not answer.
        """
        tier = Tier.make(name, (), limits)
        async with self.changing(actor) as transaction:
            return await insert_tier(transaction, tier)

    async def edit_tier(self, actor: str, name: str, limits: Collection[str], expected_revisions: ExpectedRevisions) -> TierRead:
        """Give a tier other limits of its own.

        Raises:
            PolicyError: if a limit is refused.
            NotFound: if there is no such tier.
            StaleRevision: if it was changed since.
            ManagedByFile: if the policy file owns it.
            CatalogUnavailable: if the database does not answer.
        """
        async with self.changing(actor) as transaction:
            row = await load_tier_row(transaction, name)
            require_editable(transaction, row, expected_revisions, f"tier {name!r}")
            return await update_tier(transaction, row, Tier.make(row["name"], (), limits))

    async def delete_tier(self, actor: str, name: str, expected_revisions: ExpectedRevisions) -> None:
        """Remove a tier with its rules.

        Raises:
            CatalogError: if API keys use it, or checks without a key do.
            NotFound: if there is no such tier.
            StaleRevision: if it was changed since.
            ManagedByFile: if the policy file owns it.
            CatalogUnavailable: if the database does not answer.
        """
        async with self.changing(actor) as transaction:
            row = await load_tier_row(transaction, name)
            require_editable(transaction, row, expected_revisions, f"tier {name!r}")
            user = await transaction.one(select(api_keys.c.id).where(api_keys.c.tier_id == row["id"]).limit(1))
            if user is not None:
                raise CatalogError(
                    f"tier {name!r} has API keys, such as {user['id']}: give them another tier, or revoke and delete them first"
                )
            state = await transaction.one(select(policy_state.c.anonymous_tier))
            if state is not None and state["anonymous_tier"] == row["name"]:
                raise CatalogError(f"tier {name!r} is the anonymous tier: name another one in [anonymous] of a policy first")
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
        """Add a rule to a tier; the policy file's tiers take rules too.

        Args:
            fields: of `Rule.make`.

        Raises:
            PolicyError: if a field is refused.
            CatalogError: if the tier has a rule of that name, or too many.
            NotFound: if there is no such tier.
            CatalogUnavailable: if the database does not answer.
        """
        rule = Rule.make(**fields)
        async with self.changing(actor) as transaction:
            made = await insert_rule(transaction, await load_tier_row(transaction, tier), rule)
        return made.model_copy(update={"warnings": await self._warnings(tier, made.id)})

    async def edit_rule(
        self, actor: str, rule_id: int, fields: Mapping[str, Any], expected_revisions: ExpectedRevisions, *, whole: bool = False
    ) -> RuleRead:
        """AuditedTransaction a rule. One whose name was made from methods and endpoint follows them.

        Args:
            fields: of `Rule.make`; those left out stay as they are.
            whole: whether fields left out get their defaults instead.

        Raises:
            PolicyError: if a field is refused.
            CatalogError: if the tier has another rule of that name.
            NotFound: if there is no such rule.
            StaleRevision: if it was changed since.
            ManagedByFile: if the policy file owns it.
            CatalogUnavailable: if the database does not answer.
        """
        async with self.changing(actor) as transaction:
            row = await load_rule_row(transaction, rule_id)
            require_editable(transaction, row, expected_revisions, f"rule {rule_id}")
            current = {} if whole else RuleRead.of_row(row).model_dump(include=RULE_FIELDS)
            if current and Rule.make(**{**current, "name": "any"}).default_name == row["name"]:
                current["name"] = ""
            changed = await update_rule(transaction, row, Rule.make(**{**current, **fields}))
        return changed.model_copy(update={"warnings": await self._warnings(row["tier_name"], rule_id)})

    async def delete_rule(self, actor: str, rule_id: int, expected_revisions: ExpectedRevisions) -> None:
        """Remove a rule.

        Raises:
            NotFound: if there is no such rule.
            StaleRevision: if it was changed since.
            ManagedByFile: if the policy file owns it.
            CatalogUnavailable: if the database does not answer.
        """
        async with self.changing(actor) as transaction:
            row = await load_rule_row(transaction, rule_id)
            require_editable(transaction, row, expected_revisions, f"rule {rule_id}")
            await remove_rule(transaction, row)

    async def _warnings(self, tier: str, rule_id: int) -> list[str]:
        """What the rules of a tier do to each other; compared in a thread and without the write lock, which others wait for."""
        ordered = rule_rows().where(tiers.c.name == tier).order_by(rate_limit_rules.c.position, rate_limit_rules.c.id)
        async with self.reading() as connection:
            rows = (await connection.execute(ordered)).mappings().all()
        name = next((row["name"] for row in rows if row["id"] == rule_id), "")
        return await asyncio.to_thread(lambda: coverage_warnings(tier, [policy_rows.rule_of(row) for row in rows], name))
