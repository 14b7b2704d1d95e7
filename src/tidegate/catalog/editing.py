"""Every change that operators make to tiers and rules, each in one transaction with its row in the audit log.

A change says which revision of a row it saw, and is refused where that is not the one in force. Rows of the policy file are
refused: the file would write over them. What is refused changes nothing. `editing_keys` does the same for API keys.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import Any, Final, TypeAlias

from sqlalchemy import RowMapping, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tidegate.catalog import policy_rows
from tidegate.catalog.forms import Form, rule_form, tier_form
from tidegate.catalog.shadowed import shadow_warnings
from tidegate.catalog.sql import SqlCatalog
from tidegate.catalog.tables import api_keys, audit_log, policy_state, rate_limit_rules, tiers
from tidegate.errors import CatalogError
from tidegate.policy import Rule, Tier

MAX_RULES: Final = 10_000
"""Most rules of one tier that can be made here."""

Seen: TypeAlias = Collection[int] | None
"""The revisions that whoever asks for a change has seen; None for any."""

RULE_FIELDS: Final = ("endpoint", "limits", "methods", "algorithm", "subject", "priority", "mode", "on_failure", "name")


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


class Change:
    """One transaction of one operator.

    Args:
        connection: in the transaction, which has its turn among all writers.
        actor: whose change it is, for the audit log.
        version: the catalog's version that the change will have.
    """

    def __init__(self, connection: AsyncConnection, actor: str, version: int) -> None:
        self.connection = connection
        self.actor = actor
        self.version = version

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

    async def one(self, query: Any) -> RowMapping | None:
        """The first row of a query.

        Args:
            query: a select.

        Returns:
            The row, or None.
        """
        return (await self.connection.execute(query)).mappings().first()


class CatalogEditor:
    """Changes to a catalog by operators. Any number of tasks may change at once: they take turns.

    Args:
        catalog: the catalog.
        on_change: is told the new version after each change, synchronously; must not raise.
    """

    def __init__(self, catalog: SqlCatalog, on_change: Callable[[int], None]) -> None:
        self.catalog = catalog
        self._on_change = on_change

    @contextlib.asynccontextmanager
    async def changing(self, actor: str) -> AsyncIterator[Change]:
        """A transaction that raises the version; whoever leaves it by an exception has changed nothing.

        Args:
            actor: whose change it is.

        Yields:
            The change.

        Raises:
            CatalogUnavailable: if the database does not take it.
        """
        async with self.catalog._changing() as connection:
            version = int((await connection.execute(select(policy_state.c.version))).scalar_one())
            yield Change(connection, actor, version)
        self._on_change(version)

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A connection to read from.

        Yields:
            The connection.

        Raises:
            CatalogUnavailable: if the database does not answer.
        """
        async with self.catalog._reading() as connection:
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
            row = await held_tier(change, name)
            require_editable(row, seen, f"tier {name!r}")
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
            row = await held_tier(change, name)
            require_editable(row, seen, f"tier {name!r}")
            user = await change.one(select(api_keys.c.id).where(api_keys.c.tier_id == row["id"]).limit(1))
            if user is not None:
                raise CatalogError(
                    f"tier {name!r} has API keys, such as {user['id']}: give them another tier, or revoke and delete them first"
                )
            state = await change.one(select(policy_state.c.anonymous_tier))
            if state is not None and state["anonymous_tier"] == row["name"]:
                raise CatalogError(f"tier {name!r} is the anonymous tier: name another one in [anonymous] of a policy first")
            rules = (await change.connection.execute(rule_rows().where(tiers.c.id == row["id"]))).mappings().all()
            for rule in rules:
                await change.audit("delete", "rule", str(rule["id"]), rule_form(rule), None)
            await change.connection.execute(delete(rate_limit_rules).where(rate_limit_rules.c.tier_id == row["id"]))
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
            form = await insert_rule(change, await held_tier(change, tier), rule)
            return form, await _warnings(change, tier, form["id"])

    async def edit_rule(
        self, actor: str, rule_id: int, fields: Mapping[str, Any], seen: Seen, *, whole: bool = False
    ) -> tuple[Form, list[str]]:
        """Change a rule. One whose name was made from methods and endpoint follows them.

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
            row = await held_rule(change, rule_id)
            require_editable(row, seen, f"rule {rule_id}")
            held = {} if whole else {field: value for field, value in rule_form(row).items() if field in RULE_FIELDS}
            if held and Rule.make(**{**held, "name": ""}).name == row["name"]:
                held["name"] = ""
            form = await update_rule(change, row, Rule.make(**{**held, **fields}))
            return form, await _warnings(change, row["tier_name"], rule_id)

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
            row = await held_rule(change, rule_id)
            require_editable(row, seen, f"rule {rule_id}")
            await remove_rule(change, row)


def require_editable(row: Mapping[Any, Any], seen: Seen, what: str) -> None:
    """Refuse a change of a row that the policy file owns, or that was changed since it was read.

    Args:
        row: any with `managed_by_file` and `revision`.
        seen: revisions of which one must be in force.
        what: names the row in the message.

    Raises:
        ManagedByFile: if the file owns it.
        StaleRevision: if its revision is another one.
    """
    if row["managed_by_file"]:
        raise ManagedByFile(f"{what} stands in the policy file: change it there")
    if seen is not None and row["revision"] not in seen:
        raise StaleRevision(
            f"{what} was changed meanwhile and has revision {row['revision']} now: read it again, then repeat the change",
            revision=row["revision"],
        )


async def held_tier(change: Change, name: str) -> RowMapping:
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


async def held_rule(change: Change, rule_id: int) -> RowMapping:
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


async def insert_tier(change: Change, tier: Tier) -> Form:
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
    values = {**policy_rows.row_of_tier(tier), "managed_by_file": False}
    await change.connection.execute(insert(tiers).values(values))
    form = tier_form(await held_tier(change, tier.name))
    await change.audit("create", "tier", tier.name, None, form)
    return form


async def update_tier(change: Change, row: RowMapping, tier: Tier) -> Form:
    """Give a tier's row other limits.

    Args:
        change: the transaction.
        row: the tier's row.
        tier: how it is to be.

    Returns:
        The tier's form.
    """
    values = {"limits": [limit.text for limit in tier.limits], "revision": row["revision"] + 1}
    await change.connection.execute(update(tiers).where(tiers.c.id == row["id"]).values(values))
    form = tier_form({**row, **values})
    await change.audit("update", "tier", row["name"], tier_form(row), form)
    return form


async def insert_rule(change: Change, tier: RowMapping, rule: Rule) -> Form:
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
    values = policy_rows.row_of_rule(rule, tier["id"], 0 if last is None else last + 1)
    made = insert(rate_limit_rules).values({**values, "managed_by_file": False}).returning(rate_limit_rules.c.id)
    rule_id = (await change.connection.execute(made)).scalar_one()
    form = rule_form(await held_rule(change, rule_id))
    await change.audit("create", "rule", str(rule_id), None, form)
    return form


async def update_rule(change: Change, row: RowMapping, rule: Rule) -> Form:
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
    values = policy_rows.row_of_rule(rule, row["tier_id"], row["position"])
    values |= {"managed_by_file": False, "revision": row["revision"] + 1}
    await change.connection.execute(update(rate_limit_rules).where(rate_limit_rules.c.id == row["id"]).values(values))
    form = rule_form({**row, **values})
    await change.audit("update", "rule", str(row["id"]), rule_form(row), form)
    return form


async def remove_rule(change: Change, row: RowMapping) -> None:
    """Delete a rule's row.

    Args:
        change: the transaction.
        row: the rule's row.
    """
    await change.connection.execute(delete(rate_limit_rules).where(rate_limit_rules.c.id == row["id"]))
    await change.audit("delete", "rule", str(row["id"]), rule_form(row), None)


def rule_rows() -> Any:
    """A select of rules with their tiers' names, without order.

    Returns:
        The query.
    """
    return select(rate_limit_rules, tiers.c.name.label("tier_name")).join(tiers, tiers.c.id == rate_limit_rules.c.tier_id)


def now_us() -> int:
    """Now.

    Returns:
        µs since the epoch.
    """
    return time.time_ns() // 1000


async def _require_free_name(change: Change, tier_id: int, tier: str, name: str, own: int | None) -> None:
    query = select(rate_limit_rules.c.id).where(rate_limit_rules.c.tier_id == tier_id, rate_limit_rules.c.name == name)
    other = await change.one(query)
    if other is not None and other["id"] != own:
        raise CatalogError(
            f"tier {tier!r} has a rule {name!r} already, with id {other['id']}: change that one, or give this one another name"
        )


async def _warnings(change: Change, tier: str, rule_id: int) -> list[str]:
    ordered = rule_rows().where(tiers.c.name == tier).order_by(rate_limit_rules.c.position, rate_limit_rules.c.id)
    return shadow_warnings(tier, rule_id, (await change.connection.execute(ordered)).mappings().all())
