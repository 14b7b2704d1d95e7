"""Every change that operators make to tiers and rules, each in one transaction with its row in the audit log.

A change says which revision of a row it saw, and is refused where that is not the one in force. Rows of the policy file are
refused: the file would write over them. What is refused changes nothing. `editing_keys` does the same for API keys.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import Any, Final

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tidegate.admin.records import Form, rule_form, tier_form
from tidegate.admin.transaction import (
    AuditedTransaction,
    Seen,
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

RULE_FIELDS: Final = ("endpoint", "limits", "methods", "algorithm", "subject", "priority", "mode", "on_failure", "name")


class CatalogEditor:
    """Changes to a catalog by operators. Any number of tasks may change at once: they take turns.

    Args:
        catalog: the catalog.
        on_change: is told the new version and what was touched after each change, synchronously; must not raise.
    """

    def __init__(self, catalog: SqlCatalog, on_change: Callable[[int, Collection[Item]], None]) -> None:
        self.catalog = catalog
        self._on_change = on_change

    @contextlib.asynccontextmanager
    async def changing(self, actor: str) -> AsyncIterator[AuditedTransaction]:
        """A transaction that raises the version; whoever leaves it by an exception has changed nothing.

        Args:
            actor: whose change it is.

        Yields:
            The change.

        Raises:
            CatalogUnavailable: if the database does not take it.
        """
        async with self.catalog.database.changing() as writing:
            # In the same transaction: a file may be applied or released at any time.
            digest = (await writing.connection.execute(select(policy_state.c.file_digest))).scalar()
            yield AuditedTransaction(writing, actor, digest is not None)
        self._on_change(writing.version, writing.items)

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A connection to read from.

        Yields:
            The connection.

        Raises:
            CatalogUnavailable: if the database does not answer.
        """
        async with self.catalog.database.reading() as connection:
            yield connection

    async def record(self, actor: str, action: str, kind: str, target: str, after: Form | None = None) -> None:
        """Write down what was done to something that the catalog does not hold, such as a counter.

        Args:
            actor: who did it.
            action: such as reset.
            kind: such as counters.
            target: what it was done to.
            after: what came of it.

        Raises:
            CatalogUnavailable: if the database does not take it.
        """
        async with self.changing(actor) as change:
            change.touch(NONE)
            await change.audit(action, kind, target, None, after)

    async def create_tier(self, actor: str, name: str, limits: Collection[str]) -> Form:
        """Make a tier without rules.

        Args:
            actor: who asks.
            name: 1 to 64 of letters, digits, '_', '.', '-'.
            limits: over all its endpoints; may be empty.

        Returns:
            The tier's form.

        Raises:
            PolicyError: if the name or a limit is refused.
            CatalogError: if there is such a tier.
            CatalogUnavailable: if the database does not answer.
        """
        tier = Tier.make(name, (), limits)
        async with self.changing(actor) as change:
            return await insert_tier(change, tier)

    async def edit_tier(self, actor: str, name: str, limits: Collection[str], seen: Seen) -> Form:
        """Give a tier other limits of its own.

        Args:
            actor: who asks.
            name: of the tier.
            limits: over all its endpoints; may be empty.
            seen: revisions of which one must be in force.

        Returns:
            The tier's form.

        Raises:
            PolicyError: if a limit is refused.
            NotThere: if there is no such tier.
            StaleRevision: if it was changed since.
            ManagedByFile: if the policy file owns it.
            CatalogUnavailable: if the database does not answer.
        """
        async with self.changing(actor) as change:
            row = await load_tier_row(change, name)
            require_editable(change, row, seen, f"tier {name!r}")
            return await update_tier(change, row, Tier.make(row["name"], (), limits))

    async def delete_tier(self, actor: str, name: str, seen: Seen) -> None:
        """Remove a tier with its rules.

        Args:
            actor: who asks.
            name: of the tier.
            seen: revisions of which one must be in force.

        Raises:
            CatalogError: if API keys use it, or checks without a key do.
            NotThere: if there is no such tier.
            StaleRevision: if it was changed since.
            ManagedByFile: if the policy file owns it.
            CatalogUnavailable: if the database does not answer.
        """
        async with self.changing(actor) as change:
            row = await load_tier_row(change, name)
            require_editable(change, row, seen, f"tier {name!r}")
            user = await change.one(select(api_keys.c.id).where(api_keys.c.tier_id == row["id"]).limit(1))
            if user is not None:
                raise CatalogError(
                    f"tier {name!r} has API keys, such as {user['id']}: give them another tier, or revoke and delete them first"
                )
            state = await change.one(select(policy_state.c.anonymous_tier))
            if state is not None and state["anonymous_tier"] == row["name"]:
                raise CatalogError(f"tier {name!r} is the anonymous tier: name another one in [anonymous] of a policy first")
            rules = (await change.connection.execute(rule_rows().where(tiers.c.id == row["id"]))).mappings().all()
            await change.audit_all(
                [
                    {"action": "delete", "kind": "rule", "target": str(rule["id"]), "before": rule_form(rule), "after": None}
                    for rule in rules
                ]
            )
            await change.connection.execute(delete(rate_limit_rules).where(rate_limit_rules.c.tier_id == row["id"]))
            change.touch(TIER, row["name"])
            await change.connection.execute(delete(tiers).where(tiers.c.id == row["id"]))
            await change.audit("delete", "tier", row["name"], tier_form(row), None)

    async def create_rule(self, actor: str, tier: str, fields: Mapping[str, Any]) -> tuple[Form, list[str]]:
        """Add a rule to a tier; the policy file's tiers take rules too.

        Args:
            actor: who asks.
            tier: name of the tier.
            fields: of `Rule.make`.

        Returns:
            The rule's form, and warnings.

        Raises:
            PolicyError: if a field is refused.
            CatalogError: if the tier has a rule of that name, or too many.
            NotThere: if there is no such tier.
            CatalogUnavailable: if the database does not answer.
        """
        rule = Rule.make(**fields)
        async with self.changing(actor) as change:
            form = await insert_rule(change, await load_tier_row(change, tier), rule)
        return form, await self._warnings(tier, form["id"])

    async def edit_rule(
        self, actor: str, rule_id: int, fields: Mapping[str, Any], seen: Seen, *, whole: bool = False
    ) -> tuple[Form, list[str]]:
        """AuditedTransaction a rule. One whose name was made from methods and endpoint follows them.

        Args:
            actor: who asks.
            rule_id: its id.
            fields: of `Rule.make`; those left out stay as they are.
            seen: revisions of which one must be in force.
            whole: whether fields left out get their defaults instead.

        Returns:
            The rule's form, and warnings.

        Raises:
            PolicyError: if a field is refused.
            CatalogError: if the tier has another rule of that name.
            NotThere: if there is no such rule.
            StaleRevision: if it was changed since.
            ManagedByFile: if the policy file owns it.
            CatalogUnavailable: if the database does not answer.
        """
        async with self.changing(actor) as change:
            row = await load_rule_row(change, rule_id)
            require_editable(change, row, seen, f"rule {rule_id}")
            held = {} if whole else {field: value for field, value in rule_form(row).items() if field in RULE_FIELDS}
            if held and Rule.make(**{**held, "name": "held"}).default_name == row["name"]:
                held["name"] = ""
            form = await update_rule(change, row, Rule.make(**{**held, **fields}))
        return form, await self._warnings(row["tier_name"], rule_id)

    async def delete_rule(self, actor: str, rule_id: int, seen: Seen) -> None:
        """Remove a rule.

        Args:
            actor: who asks.
            rule_id: its id.
            seen: revisions of which one must be in force.

        Raises:
            NotThere: if there is no such rule.
            StaleRevision: if it was changed since.
            ManagedByFile: if the policy file owns it.
            CatalogUnavailable: if the database does not answer.
        """
        async with self.changing(actor) as change:
            row = await load_rule_row(change, rule_id)
            require_editable(change, row, seen, f"rule {rule_id}")
            await remove_rule(change, row)

    async def _warnings(self, tier: str, rule_id: int) -> list[str]:
        """What the rules of a tier do to each other; compared in a thread and without the write lock, which others wait for."""
        ordered = rule_rows().where(tiers.c.name == tier).order_by(rate_limit_rules.c.position, rate_limit_rules.c.id)
        async with self.reading() as connection:
            rows = (await connection.execute(ordered)).mappings().all()
        name = next((row["name"] for row in rows if row["id"] == rule_id), "")
        return await asyncio.to_thread(lambda: coverage_warnings(tier, [policy_rows.rule_of(row) for row in rows], name))
