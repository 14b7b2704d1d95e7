"""Computes the changes of an import: compares a policy with the catalog's rows, without a database.

The comparison runs before the write lock is acquired.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from tidegate.admin.models import CustomerRead, JsonObject, KeyRead, Row, RuleRead, TierRead
from tidegate.admin.models.subject_overrides import SubjectOverrideRead
from tidegate.admin.transaction import MAX_RULES, Audited, ManagedByFile, audited
from tidegate.catalog.changes import ANONYMOUS, KEY, TIER, Item
from tidegate.catalog.sql import rows as policy_rows
from tidegate.catalog.sql.customers import row_of_customer
from tidegate.catalog.sql.override_rows import OverrideKey, OverrideRow, changed_entry, require_few_entries
from tidegate.errors import CatalogError
from tidegate.policy.attributes import CallerPolicy
from tidegate.policy.customers import Customer
from tidegate.policy.model import ApiKey, KeyStatus, Policy, Tier

Values: TypeAlias = dict[str, Any]


class CatalogRows(msgspec.Struct, frozen=True):
    """The catalog's rows that a policy names; with `prune`, also those that might be removed.

    Args:
        version: version of the catalog before the rows were read.
        caller_policy: what the catalog says of callers without an API key.
        has_file: whether a policy file is active; without one, operators own the rows that a former file created.
        rules: by the name of the tier, then of the rule; with `tier_name`.
        keys: by digest; with `tier_name` and `customer_name`.
        customers: by name; with `tier_name`.
        overrides: those for subjects, by the name of the tier, then by key.
    """

    version: int
    caller_policy: CallerPolicy
    has_file: bool
    tiers: dict[str, Row]
    rules: dict[str, dict[str, Row]]
    keys: dict[str, Row]
    customers: dict[str, Row]
    overrides: dict[str, dict[OverrideKey, OverrideRow]]


class RuleInsert(msgspec.Struct):
    """A rule to insert.

    Args:
        values: columns of its row, without the tier's id.
        change: the change for the response and the audit log, without the rule's id until it is inserted.
    """

    values: Values
    tier: str
    change: JsonObject


class ImportPlan(msgspec.Struct):
    """Rows to write, and the changes in the format of the audit log, in the order of the policy."""

    changes: list[JsonObject] = []
    touched: list[Item] = []
    tier_inserts: list[Values] = []
    tier_updates: list[Values] = []
    tier_deletes: list[int] = []
    rule_inserts: list[RuleInsert] = []
    rule_updates: list[Values] = []
    rule_deletes: list[int] = []
    key_inserts: list[Values] = []
    key_updates: list[Values] = []
    key_deletes: list[str] = []
    customer_inserts: list[Values] = []
    customer_updates: list[tuple[Row, Values]] = []
    customer_deletes: list[Row] = []
    caller_policy: CallerPolicy | None = None
    overrides: dict[str, dict[OverrideKey, OverrideRow]] = {}


def plan_import(policy: Policy, existing: CatalogRows, now_us: int, *, prune: bool) -> ImportPlan:
    """Compare a policy with the catalog's rows.

    Args:
        existing: the rows, read with the same `prune`.
        prune: whether rows that neither the policy nor the policy file names are removed.

    Raises:
        ManagedByFile: if the policy contradicts the policy file.
        CatalogError: if a change is not possible.
    """
    return _Planner(policy, existing, now_us, prune).plan()


class _Planner:
    def __init__(self, policy: Policy, existing: CatalogRows, now_us: int, prune: bool) -> None:
        self._policy = policy
        self._existing = existing
        self._now_us = now_us
        self._prune = prune
        self._plan = ImportPlan()

    def plan(self) -> ImportPlan:
        for tier in self._policy.tiers:
            self._import_tier(tier)
        for customer in self._policy.customers:
            self._import_customer(customer)
        for api_key in self._policy.api_keys:
            self._import_key(api_key)
        if self._prune:
            self._prune_keys()
            self._prune_customers()
        self._import_caller_policy()
        if self._prune:
            self._prune_tiers()
        return self._plan

    def _record(self, action: str, kind: str, target: str, before: Audited, after: Audited) -> JsonObject:
        change: JsonObject = {
            "action": action,
            "kind": kind,
            "target": target,
            "before": audited(before),
            "after": audited(after),
        }
        self._plan.changes.append(change)
        return change

    def _import_tier(self, tier: Tier) -> None:
        row = self._existing.tiers.get(tier.name)
        values = {**policy_rows.row_of_tier(tier), "managed_by_file": False}
        if row is None:
            self._plan.touched.append((TIER, tier.name))
            self._plan.tier_inserts.append(values)
            self._record("create", "tier", tier.name, None, TierRead.of_row({**values, "revision": 1}))
        elif any(values[column] != row[column] for column in policy_rows.TIER_COLUMNS):
            self._require_own(row, f"tier {tier.name!r}")
            self._plan.touched.append((TIER, tier.name))
            changed = {**row, **values, "revision": row["revision"] + 1}
            self._plan.tier_updates.append(changed)
            self._record("update", "tier", tier.name, TierRead.of_row(row), TierRead.of_row(changed))
        self._import_rules(tier)
        self._import_overrides(tier)

    def _import_rules(self, tier: Tier) -> None:
        existing = dict(self._existing.rules.get(tier.name, {}))
        created = sum(rule.name not in existing for rule in tier.rules)
        if created and len(existing) + created > MAX_RULES:
            raise CatalogError(
                f"tier {tier.name!r} would have {len(existing) + created} rules: at most {MAX_RULES} are kept; remove some first"
            )
        position = max((row["position"] for row in existing.values()), default=-1)
        for rule in tier.rules:
            kept = existing.pop(rule.name, None)
            if kept is None:
                position += 1
                values = {**policy_rows.row_of_rule(rule, 0, position), "managed_by_file": False}
                del values["tier_id"]
                record = RuleRead.of_row({**values, "id": 0, "tier_name": tier.name, "revision": 1})
                # Its id is set after the insert.
                change = self._record("create", "rule", rule.name, None, {**record.audited(), "id": None})
                self._plan.rule_inserts.append(RuleInsert(values, tier.name, change))
                self._plan.touched.append((TIER, tier.name))
                continue
            values = policy_rows.row_of_rule(rule, kept["tier_id"], kept["position"])
            del values["managed_by_file"]
            if any(kept[column] != value for column, value in values.items()):
                self._require_own(kept, f"rule {rule.name!r} of tier {tier.name!r}")
                written = {**values, "id": kept["id"], "managed_by_file": False, "revision": kept["revision"] + 1}
                self._plan.rule_updates.append(written)
                self._plan.touched.append((TIER, tier.name))
                self._record("update", "rule", str(kept["id"]), RuleRead.of_row(kept), RuleRead.of_row({**kept, **written}))
        if self._prune:
            self._remove_rules(row for row in existing.values() if not self._is_of_file(row))

    def _remove_rules(self, rows: Any) -> None:
        for row in rows:
            self._plan.rule_deletes.append(row["id"])
            self._plan.touched.append((TIER, row["tier_name"]))
            self._record("delete", "rule", str(row["id"]), RuleRead.of_row(row), None)

    def _import_overrides(self, tier: Tier) -> None:
        existing = self._existing.overrides.get(tier.name, {})
        entries = dict(existing)
        for override in tier.overrides:
            before = existing.get(override.key)
            after = changed_entry(before, override, before is not None and before["managed_by_file"])
            if after == before:
                continue
            if before is not None:
                self._require_own(before, f"the override of rule {override.rule!r} of tier {tier.name!r}")
            entries[override.key] = after = {**after, "managed_by_file": False}
            self._record_override(tier.name, "create" if before is None else "update", before, after)
        if self._prune:
            named = {override.key for override in tier.overrides}
            for key, entry in existing.items():
                if key not in named and not self._is_of_file(entry):
                    del entries[key]
                    self._record_override(tier.name, "delete", entry, None)
        if entries != existing:
            require_few_entries(entries, tier.name)
            self._plan.overrides[tier.name] = entries
            self._plan.touched.append((TIER, tier.name))

    def _record_override(self, tier: str, action: str, before: OverrideRow | None, after: OverrideRow | None) -> None:
        states = [None if entry is None else SubjectOverrideRead.of_entry(tier, entry) for entry in (before, after)]
        read = states[0] or states[1]
        assert read is not None, "there is one of them"
        self._record(action, "override", read.target, states[0], states[1])

    def _import_key(self, api_key: ApiKey) -> None:
        row = self._existing.keys.get(api_key.sha256)
        created_at_us = self._now_us if row is None else row["created_at_us"]
        values = {**policy_rows.row_of_api_key(api_key, 0, created_at_us), "tier_name": api_key.tier, "managed_by_file": False}
        # Tier and customer may be created by the same import: their ids are set after the insert.
        del values["tier_id"]
        del values["customer_id"]
        values["customer_name"] = api_key.customer or None
        if row is None:
            self._plan.touched.append((KEY, api_key.sha256))
            self._plan.key_inserts.append(values)
            created = KeyRead.of_row({**values, "counts_as": None, "revision": 1, "revoked_at_us": None, "revoked_reason": None})
            self._record("create", "api_key", api_key.id, None, created)
            return
        changed = {column: value for column, value in values.items() if column != "managed_by_file" and row[column] != value}
        if not changed:
            return
        self._require_own(row, f"the API key {row['id']}")
        if "status" in changed:
            over = api_key.status is KeyStatus.REVOKED
            changed |= {
                "revoked_at_us": self._now_us if over else None,
                "revoked_reason": "by import of a policy" if over else None,
            }
        written = {**row, **changed, "managed_by_file": False, "revision": row["revision"] + 1}
        self._plan.touched.append((KEY, api_key.sha256))
        self._plan.key_updates.append(written)
        self._record("update", "api_key", row["id"], KeyRead.of_row(row), KeyRead.of_row(written))

    def _import_customer(self, customer: Customer) -> None:
        row = self._existing.customers.get(customer.name)
        values = {**row_of_customer(customer, None), "tier_name": customer.tier or None, "managed_by_file": False}
        del values["tier_id"]
        if row is None:
            self._plan.customer_inserts.append(values)
            created = CustomerRead.of_row({**values, "created_at_us": self._now_us, "revision": 1})
            self._record("create", "customer", customer.name, None, created)
            return
        if all(row[column] == value for column, value in values.items() if column != "managed_by_file"):
            return
        self._require_own(row, f"the customer {customer.name!r}")
        written = {**values, "revision": row["revision"] + 1}
        self._plan.customer_updates.append((row, written))
        after = CustomerRead.of_row({**row, **written})
        self._record("update", "customer", customer.name, CustomerRead.of_row(row), after)

    def _prune_customers(self) -> None:
        named = {customer.name for customer in self._policy.customers}
        for name, row in self._existing.customers.items():
            if name not in named and not self._is_of_file(row):
                self._plan.customer_deletes.append(row)
                self._record("delete", "customer", name, CustomerRead.of_row(row), None)

    def _prune_keys(self) -> None:
        named = {api_key.sha256 for api_key in self._policy.api_keys}
        for sha256, row in self._existing.keys.items():
            if sha256 not in named and not self._is_of_file(row):
                self._plan.key_deletes.append(row["id"])
                self._plan.touched.append((KEY, sha256))
                self._record("delete", "api_key", row["id"], KeyRead.of_row(row), None)

    def _import_caller_policy(self) -> None:
        """A table such as [callers] that the policy does not have does not change: a policy may name a single tier."""
        given, existing = self._policy.caller_policy, self._existing.caller_policy
        named = {namespace.name: namespace for namespace in (*existing.namespaces, *given.namespaces)}
        taken = CallerPolicy(
            given.anonymous_tier or existing.anonymous_tier,
            given.callers or existing.callers,
            given.attributes or existing.attributes,
            given.jwt or existing.jwt,
            tuple(given.namespaces if self._prune else named.values()) or existing.namespaces,
            given.access or existing.access,
            # Follows from the customers.
            existing.customer_attributes,
            given.notify or existing.notify,
        )
        if taken == existing:
            return
        if self._existing.has_file:
            if taken.anonymous_tier != existing.anonymous_tier:
                raise ManagedByFile(f"the anonymous tier is {existing.anonymous_tier!r} by the policy file: change it there")
            raise ManagedByFile(
                "[callers], [attributes], [jwt], [[namespaces]], [[access]] or [[notify]] differ from the policy file: change "
                "them there, or leave them out here"
            )
        self._plan.caller_policy = taken
        self._plan.touched.append((ANONYMOUS, ""))
        if taken.anonymous_tier != existing.anonymous_tier:
            name = taken.anonymous_tier or ""
            self._record("update", "anonymous_tier", name, {"tier": existing.anonymous_tier}, {"tier": name})
        before, after = policy_rows.row_of_caller_policy(existing), policy_rows.row_of_caller_policy(taken)
        for kind in ("callers", "attributes", "jwt"):
            if before[kind] != after[kind]:
                self._record("update", kind, kind, before[kind], after[kind])
        for kind in ("namespaces", "access", "notify"):
            if before[kind] != after[kind]:
                states = ({kind: state[kind] or []} for state in (before, after))
                self._record("update", kind, kind, *states)

    def _prune_tiers(self) -> None:
        named = {tier.name for tier in self._policy.tiers}
        callers = self._plan.caller_policy or self._existing.caller_policy
        for name, row in self._existing.tiers.items():
            if name in named or self._is_of_file(row):
                continue
            if callers.anonymous_tier == name:
                raise CatalogError(f"tier {name!r} is the anonymous tier: name another one in [anonymous] of the policy")
            if callers.callers is not None and callers.callers.default_tier == name:
                raise CatalogError(f"tier {name!r} is the default_tier of [callers]: name another one there")
            self._remove_rules(self._existing.rules.get(name, {}).values())
            self._plan.tier_deletes.append(row["id"])
            self._plan.touched.append((TIER, name))
            self._record("delete", "tier", name, TierRead.of_row(row), None)

    def _is_of_file(self, row: Row) -> bool:
        return self._existing.has_file and bool(row["managed_by_file"])

    def _require_own(self, row: Row, what: str) -> None:
        if self._is_of_file(row):
            raise ManagedByFile(f"{what} differs from the policy file: change it there, or remove it from this policy")
