"""The policy file: TOML into a `Policy`, whole or not at all; and a catalog that holds one policy in memory.

An error names file, line and reason; an API key is never part of a message.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from tidegate.errors import PolicyError
from tidegate.policy.attributes import match_of
from tidegate.policy.customers import Customer
from tidegate.policy.descriptors import descriptor_text
from tidegate.policy.fields import short
from tidegate.policy.key_format import parse_key_digest
from tidegate.policy.labels import label_fault
from tidegate.policy.limits import is_zero
from tidegate.policy.model import ApiKey, KeyStatus, Policy, Tier
from tidegate.policy.overrides import Override
from tidegate.policy.rules import Rule, Subject
from tidegate.policy.toml_callers import read_access, read_anonymous, read_attributes, read_callers, read_jwt, read_namespaces
from tidegate.policy.toml_customers import read_customers
from tidegate.policy.toml_lines import MAX_KEY_PARTS, LineIndex, line_of_deep_key
from tidegate.policy.toml_lines import Path as KeyPath
from tidegate.policy.toml_notify import read_notify
from tidegate.policy.toml_overrides import read_overrides, read_subject_overrides
from tidegate.policy.toml_tables import MAX_LIST, TableReader, nearest
from tidegate.policy.warnings import policy_warnings

__all__ = ["MAX_FILE_BYTES", "load_policy", "parse_policy", "policy_warnings", "read_policy_text"]

MAX_FILE_BYTES: Final = 10_000_000
MAX_TIERS: Final = 1_000
MAX_RULES: Final = 10_000
"""Most rules of one policy, over all its tiers."""
_POLICY_FIELDS: Final = (
    "tiers",
    "api_keys",
    "anonymous",
    "attributes",
    "callers",
    "jwt",
    "namespaces",
    "access",
    "customers",
    "notify",
)
_TIER_FIELDS: Final = ("name", "limits", "rules", "quotas", "overage", "overrides")
_RULE_FIELDS: Final = (
    "endpoint",
    "descriptor",
    "methods",
    "algorithm",
    "limits",
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
    "count",
    "statuses",
    "clear_on_success",
    "penalty",
)
_DIGEST_FIELDS: Final = ("key", "hmac_sha256", "sha256")
_KEY_FIELDS: Final = (*_DIGEST_FIELDS, "tier", "customer", "name", "status", "expires_at", "limits", "quotas", "overrides")


def load_policy(path: Path) -> Policy:
    """Read a policy file.

    Args:
        path: the file, or a link to it.

    Raises:
        PolicyError: with file, line and reason.
    """
    return parse_policy(read_policy_text(path), str(path))


def read_policy_text(path: Path) -> str:
    """The text of a policy file.

    Args:
        path: the file, or a link to it.

    Raises:
        PolicyError: if it cannot be read, is larger than 10 MB or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise PolicyError("the policy file is not there: give its path with [policy] file, or --policy", str(path)) from None
    except OSError as error:
        raise PolicyError(f"the policy file cannot be read: {error.strerror or error}", str(path)) from None
    if len(raw) > MAX_FILE_BYTES:
        raise PolicyError(f"the policy file has more than {MAX_FILE_BYTES} bytes: keep API keys in the catalog", str(path))
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise PolicyError("the policy file is not UTF-8 here", str(path), line) from None


def parse_policy(text: str, file: str | None = None) -> Policy:
    """Read the text of a policy file.

    Raises:
        PolicyError: with file, line and reason.
    """
    # As editors on Windows write it. The lines are found in the same text, or the first table would have none.
    text = text.removeprefix("\ufeff")
    deep = line_of_deep_key(text)
    if deep is not None:
        raise PolicyError(f"a dotted key has more than {MAX_KEY_PARTS} parts: a policy needs two at most", file, deep)
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at line (\d+), column (\d+)\)|\(at end of document\)", str(error))
        line = int(found.group(1)) if found and found.group(1) else text.count("\n") + 1
        reason = str(error)[: found.start()].strip() if found else str(error)
        raise PolicyError(f"not TOML: {reason[:200]}", file, line) from None
    except ValueError:
        # Python's own bound on the digits of a number, which `tomllib` lets through without a position.
        raise PolicyError("not TOML that can be read: a number has too many digits", file, 1) from None
    except RecursionError:
        raise PolicyError("not TOML that can be read: it is nested too deeply", file, 1) from None
    return _Reader(raw, TableReader(LineIndex(text), file)).policy()


class _Reader:
    """Reads one decoded file."""

    def __init__(self, raw: dict[str, Any], tables: TableReader) -> None:
        self._raw = raw
        self._tables = tables
        self._rules_read = 0

    def policy(self) -> Policy:
        self._tables.known(self._raw, _POLICY_FIELDS, ())
        tiers: dict[str, Tier] = {}
        for at, table in self._tables.tables(self._raw, "tiers", (), MAX_TIERS):
            tier = self._tier(table, at)
            if tier.name in tiers:
                raise self._tables.error(f"tier {tier.name!r} stands twice: merge the two, or rename one", (*at, "name"))
            tiers[tier.name] = tier
        if not tiers and not self._raw.get("namespaces"):
            raise self._tables.error("the policy has no tiers: it needs at least one [[tiers]]", ())
        customers = read_customers(self._tables, self._raw, tiers)
        keys: dict[str, ApiKey] = {}
        for at, table in self._tables.tables(self._raw, "api_keys", ()):
            api_key = self._api_key(table, at, tiers, customers)
            if api_key.sha256 in keys:
                raise self._tables.error(f"the API key with the digest {api_key.sha256[:12]}… stands twice: remove one", at)
            keys[api_key.sha256] = api_key
        return Policy(
            tuple(tiers.values()),
            tuple(keys.values()),
            read_anonymous(self._tables, self._raw, tiers),
            read_attributes(self._tables, self._raw),
            read_callers(self._tables, self._raw, tiers),
            read_jwt(self._tables, self._raw),
            read_namespaces(self._tables, self._raw),
            read_access(self._tables, self._raw),
            tuple(customers.values()),
            read_notify(self._tables, self._raw),
        )

    def _tier(self, table: dict[str, Any], at: KeyPath) -> Tier:
        self._tables.known(table, _TIER_FIELDS, at)
        self._tables.required(table, ("name",), at)
        limits = self._tables.limits(table.get("limits", []), (*at, "limits"))
        rules: dict[str, Rule] = {}
        for rule_at, rule_table in self._tables.tables(table, "rules", at, MAX_RULES):
            self._rules_read += 1
            if self._rules_read > MAX_RULES:
                raise self._tables.error(
                    f"the policy has more than {MAX_RULES} rules: let patterns ('*', '{{id}}') cover several", rule_at
                )
            rule = self._rule(rule_table, rule_at)
            if rule.name in rules:
                raise self._tables.error(
                    f"tier {short(table['name'])} has two rules {rule.name!r}: "
                    "remove one, or give it other methods, mode or a name",
                    rule_at,
                )
            rules[rule.name] = rule
        quotas = self._tables.quotas(table, at)
        tier = self._tables.placed(
            lambda: Tier.make(table["name"], rules.values(), limits, quotas, table.get("overage")), at, table
        )
        overrides = read_subject_overrides(self._tables, table, at, tier.name, rules)
        return msgspec.structs.replace(tier, managed_by_file=True, overrides=overrides)

    def _rule(self, table: dict[str, Any], at: KeyPath) -> Rule:
        self._tables.known(table, _RULE_FIELDS, at)
        self._tables.required(table, () if "descriptor" in table or "match" in table else ("endpoint",), at)
        quotas = self._tables.quotas(table, at)
        self._tables.required(table, () if quotas or "action" in table else ("limits",), at)
        written = table.get("limits", [])
        # Not parsed: a limit of 0 is an action.
        denies = isinstance(written, list) and len(written) <= MAX_LIST and any(map(is_zero, written))
        limits = tuple(written) if denies else self._tables.limits(written, (*at, "limits"))
        table = self._with_endpoint(table, at)
        methods = table.get("methods", [])
        if not isinstance(methods, list) or ("methods" in table and not methods):
            raise self._tables.error('methods must be a list such as ["GET"]; leave it out for every method', (*at, "methods"))
        if len(methods) > MAX_LIST:
            raise self._tables.error(
                f"methods has {len(methods)} entries: at most {MAX_LIST} are read; leave it out for all", (*at, "methods")
            )
        if "name" in table and (not isinstance(table["name"], str) or not table["name"]):
            raise self._tables.error("name must be a non-empty string", (*at, "name"))
        return self._tables.placed(
            lambda: Rule.make(**{**table, "limits": limits, "methods": methods, "quotas": quotas}), at, table
        )

    def _with_endpoint(self, table: dict[str, Any], at: KeyPath) -> dict[str, Any]:
        """A rule's table with an endpoint text for its descriptor, or for a match without an endpoint."""
        if "descriptor" not in table:
            if "endpoint" in table:
                return table
            # Without an endpoint it is for checks without a path, whose entries a descriptor names.
            match, match_at = table["match"], (*at, "match")
            entries = self._tables.placed(lambda: match_of(match), match_at)
            text = self._tables.placed(lambda: descriptor_text(dict(entries)), match_at)
            return {**{field: value for field, value in table.items() if field != "match"}, "endpoint": text}
        descriptor, descriptor_at = table["descriptor"], (*at, "descriptor")
        if "endpoint" in table:
            raise self._tables.error("endpoint and descriptor stand side by side: a rule is for one of them", descriptor_at)
        if not isinstance(descriptor, dict):
            raise self._tables.error('descriptor is a table: write descriptor = { user = "*" }', descriptor_at)
        text = self._tables.placed(lambda: descriptor_text(descriptor), descriptor_at)
        return {**{field: value for field, value in table.items() if field != "descriptor"}, "endpoint": text}

    def _api_key(
        self, table: dict[str, Any], at: KeyPath, tiers: Mapping[str, Tier], customers: Mapping[str, Customer]
    ) -> ApiKey:
        self._tables.known(table, _KEY_FIELDS, at)
        customer = self._customer_of(table, at, customers)
        inherits = "tier" not in table and customer is not None and bool(customer.tier)
        if not inherits:
            self._tables.required(table, ("tier",), at)
        name = table.get("name", "")
        if not isinstance(name, str) or len(name) > 200:
            raise self._tables.error("name must be a string of at most 200 characters", (*at, "name"))
        fault = label_fault(name)
        if fault is not None:
            raise self._tables.error(f"name {fault}", (*at, "name"))
        named = customer.tier if inherits and customer is not None else table["tier"]
        tier = tiers.get(named) if isinstance(named, str) else None
        if tier is None:
            raise self._tables.error(f"tier {short(named)} is not in this policy{nearest(named, tiers)}", (*at, "tier"))
        status = table.get("status", KeyStatus.ACTIVE.value)
        if status not in tuple(KeyStatus):
            raise self._tables.error(f"status {short(status)} is not known: use active or revoked", (*at, "status"))
        given = [table.get(field) for field in ("key", "sha256", "hmac_sha256")]
        digest_at = (*at, next((field for field in _DIGEST_FIELDS if field in table), "sha256"))
        return ApiKey(
            sha256=self._tables.placed(lambda: parse_key_digest(*given), digest_at),
            tier=tier.name,
            status=KeyStatus(status),
            name=name,
            expires_at_us=self._tables.moment_us(table["expires_at"], (*at, "expires_at")) if "expires_at" in table else None,
            overrides=self._key_overrides(table, at, tier, customer),
            managed_by_file=True,
            customer="" if customer is None else customer.name,
            inherits_tier=inherits,
        )

    def _key_overrides(self, table: dict[str, Any], at: KeyPath, tier: Tier, customer: Customer | None) -> tuple[Override, ...]:
        overrides = read_overrides(self._tables, table, at, tier, "key", (Subject.API_KEY,))
        if customer is not None and any(each.quotas for each in overrides):
            raise self._tables.error(
                f"quotas of the customer {customer.name!r} count all of its keys together: override them for the customer, "
                "not for a key",
                (*at, "overrides"),
            )
        return overrides

    def _customer_of(self, table: dict[str, Any], at: KeyPath, customers: Mapping[str, Customer]) -> Customer | None:
        if "customer" not in table:
            return None
        name = table["customer"]
        customer = customers.get(name) if isinstance(name, str) else None
        if customer is None:
            raise self._tables.error(f"customer {short(name)} is not in this policy{nearest(name, customers)}", (*at, "customer"))
        return customer
