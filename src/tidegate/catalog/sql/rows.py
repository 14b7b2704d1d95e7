"""Converts between the records of `policy` and the rows of `tables`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from tidegate.catalog.sql import override_rows as subject_rows
from tidegate.catalog.sql.namespace_rows import namespace_fields, namespace_of
from tidegate.policy.access_entries import AccessAction, AccessEntry
from tidegate.policy.attributes import AttributeSource, CallerPolicy, CallerRules, OnMissing
from tidegate.policy.failures import FailureCount
from tidegate.policy.jwt_policy import JwtPolicy
from tidegate.policy.limits import Algorithm, AnyAlgorithm, FailureAlgorithm, Limit, OnFailure
from tidegate.policy.model import ApiKey, KeyStatus, Tier
from tidegate.policy.notify import target_of
from tidegate.policy.overrides import Override
from tidegate.policy.quotas import Overage, Quota
from tidegate.policy.rules import Mode, Rule, Subject

RULE_COLUMNS: Final = (
    "endpoint_pattern",
    "methods",
    "algorithm",
    "limits",
    "subject",
    "priority",
    "mode",
    "on_failure",
    "match_attributes",
    "subject_attributes",
    "on_missing",
    "quotas",
    "overage",
    "leases",
    "action",
    "failures",
)
"""Columns with the fields of a rule."""
TIER_COLUMNS: Final = ("limits", "quotas", "overage")
"""Columns with the fields of a tier."""
KEY_COLUMNS: Final = ("tier_id", "name", "status", "expires_at_us", "overrides", "customer_id", "inherits_tier")
"""Columns with the fields of an API key."""


_CUSTOMER: Final = [Subject.CUSTOMER.value]
"""How a rule that counts customers is stored: versions without customers count by the address then."""


def tier_of(
    row: Mapping[Any, Any], rules: Iterable[Mapping[Any, Any]], overrides: Sequence[Mapping[str, Any]] | None = None
) -> Tier:
    """The tier in a row of `tiers`, its rows of `rate_limit_rules`, in order, and its entries of `subject_overrides`."""
    return Tier(
        name=row["name"],
        rules=tuple(rule_of(rule) for rule in rules),
        limits=tuple(Limit.parse(text) for text in row["limits"]),
        managed_by_file=row["managed_by_file"],
        quotas=tuple(Quota.parse(text) for text in row["quotas"] or ()),
        overage=Overage.parse(row["overage"]),
        overrides=subject_rows.overrides_of(overrides),
    )


def rule_of(row: Mapping[Any, Any]) -> Rule:
    """The rule in a row of `rate_limit_rules`."""
    return Rule(
        endpoint=row["endpoint_pattern"],
        limits=tuple(Limit.parse(text) for text in row["limits"]),
        methods=tuple(row["methods"]),
        algorithm=Algorithm(row["algorithm"]),
        subject=_subject_of(row["subject_attributes"], row["subject"]),
        priority=row["priority"],
        mode=Mode(row["mode"]),
        on_failure=OnFailure(row["on_failure"]),
        name=row["name"],
        match=tuple(sorted((row["match_attributes"] or {}).items())),
        subject_parts=() if row["subject_attributes"] == _CUSTOMER else tuple(row["subject_attributes"] or ()),
        on_missing=OnMissing(row["on_missing"] or OnMissing.IP),
        leases=row["leases"] in (None, True),
        quotas=tuple(Quota.parse(text) for text in row["quotas"] or ()),
        overage=Overage.parse(row["overage"]),
        action=None if row["action"] is None else AccessAction(row["action"]),
        failures=FailureCount.of_stored(row["failures"]),
    )


def counting_of(row: Mapping[Any, Any]) -> AnyAlgorithm:
    """How the limits in a row of `rate_limit_rules` count."""
    return Algorithm(row["algorithm"]) if row["failures"] is None else FailureAlgorithm.FAILURES


def _subject_of(parts: list[str] | None, subject: str) -> Subject:
    if parts == _CUSTOMER:
        return Subject.CUSTOMER
    return Subject.ATTRIBUTES if parts else Subject(subject)


def subject_value_of(row: Mapping[Any, Any]) -> str | list[str]:
    """The subject in a row of `rate_limit_rules`, as a policy names it: one name, or a list."""
    parts = row["subject_attributes"]
    if not parts:
        return str(row["subject"])
    return str(parts[0]) if len(parts) == 1 else list(parts)


CALLER_POLICY_COLUMNS: Final = (
    "anonymous_tier",
    "callers",
    "attributes",
    "jwt",
    "namespaces",
    "access",
    "customer_attributes",
    "notify",
)


def caller_policy_of(row: Mapping[Any, Any]) -> CallerPolicy:
    """What the row of `policy_state` says of callers without an API key."""
    callers = row["callers"]
    return CallerPolicy(
        row["anonymous_tier"],
        None if callers is None else CallerRules(callers.get("tier_from", ""), callers.get("default_tier", "")),
        tuple(AttributeSource.make(name, source) for name, source in (row["attributes"] or {}).items()),
        None if row["jwt"] is None else JwtPolicy.make(**row["jwt"]),
        tuple(namespace_of(entry) for entry in row["namespaces"] or ()),
        tuple(_access_entry(each) for each in row["access"] or ()),
        tuple(row["customer_attributes"] or ()),
        tuple(target_of(fields) for fields in row["notify"] or ()),
    )


def row_of_caller_policy(policy: CallerPolicy) -> dict[str, Any]:
    """The values of `policy_state` for a caller policy; its namespaces without owners and revisions: see `namespace_rows`."""
    callers = policy.callers
    return {
        "anonymous_tier": policy.anonymous_tier,
        "callers": None if callers is None else {"tier_from": callers.tier_from, "default_tier": callers.default_tier},
        "attributes": {source.name: source.text for source in policy.attributes} or None,
        "jwt": None if policy.jwt is None else msgspec.to_builtins(policy.jwt),
        "namespaces": [namespace_fields(namespace) for namespace in policy.namespaces] or None,
        "access": [_access_row(entry) for entry in policy.access] or None,
        "notify": [target.fields for target in policy.notify] or None,
    }


def _access_row(entry: AccessEntry) -> dict[str, Any]:
    named = {"from": list(entry.networks), "match": dict(entry.match), "customer": entry.customer, "api_key_id": entry.api_key_id}
    return {"action": entry.action.value, **{field: value for field, value in named.items() if value}}


def _access_entry(row: Mapping[str, Any]) -> AccessEntry:
    # As it was validated before it was stored: networks need not be parsed again.
    return AccessEntry(
        AccessAction(row["action"]),
        tuple(row.get("from", ())),
        tuple(sorted(row.get("match", {}).items())),
        row.get("customer", ""),
        row.get("api_key_id", ""),
    )


def api_key_of(row: Mapping[Any, Any]) -> ApiKey:
    """The API key in a row.

    Args:
        row: row of `api_keys`, with the name of its tier as `tier_name` and that of its customer as `customer_name`.
    """
    return ApiKey(
        sha256=row["sha256"],
        tier=row["tier_name"],
        status=KeyStatus(row["status"]),
        name=row["name"],
        expires_at_us=row["expires_at_us"],
        overrides=overrides_of(row["overrides"]),
        managed_by_file=row["managed_by_file"],
        counts_as=row["counts_as"] or "",
        customer=row["customer_name"] or "",
        inherits_tier=bool(row["inherits_tier"]),
    )


def row_of_tier(tier: Tier) -> dict[str, Any]:
    """The values of a tier's row, without its id."""
    return {
        "name": tier.name,
        "limits": [limit.text for limit in tier.limits],
        "managed_by_file": tier.managed_by_file,
        **_quota_values(tier),
    }


def row_of_rule(rule: Rule, tier_id: int, position: int) -> dict[str, Any]:
    """The values of a rule's row that is owned by the policy file, without its id."""
    return {
        "tier_id": tier_id,
        "name": rule.name,
        "endpoint_pattern": rule.endpoint,
        "methods": list(rule.methods),
        "algorithm": rule.algorithm.value,
        "limits": [limit.text for limit in rule.limits],
        # A value that every version knows: those before there were attributes count API keys instead.
        "subject": Subject.API_KEY.value if rule.subject_parts or rule.subject is Subject.CUSTOMER else rule.subject.value,
        "priority": rule.priority,
        "mode": rule.mode.value,
        "on_failure": rule.on_failure.value,
        "position": position,
        "managed_by_file": True,
        "match_attributes": dict(rule.match) or None,
        "subject_attributes": list(_CUSTOMER) if rule.subject is Subject.CUSTOMER else list(rule.subject_parts) or None,
        "on_missing": None if rule.on_missing is OnMissing.IP else rule.on_missing.value,
        "leases": None if rule.leases else False,
        **_quota_values(rule),
        "action": None if rule.action is None else rule.action.value,
        "failures": None if rule.failures is None else rule.failures.stored,
    }


def _quota_values(record: Tier | Rule) -> dict[str, Any]:
    return {
        "quotas": [quota.text for quota in record.quotas] or None,
        "overage": None if record.overage is None else record.overage.value,
    }


def row_of_api_key(api_key: ApiKey, tier_id: int, created_at_us: int, customer_id: int | None = None) -> dict[str, Any]:
    """The values of an API key's row."""
    return {
        "id": api_key.id,
        "sha256": api_key.sha256,
        "tier_id": tier_id,
        "name": api_key.name,
        "status": api_key.status.value,
        "expires_at_us": api_key.expires_at_us,
        "overrides": override_rows(api_key.overrides),
        "created_at_us": created_at_us,
        "managed_by_file": api_key.managed_by_file,
        "customer_id": customer_id,
        "inherits_tier": api_key.inherits_tier,
    }


def override_rows(overrides: Iterable[Override]) -> list[dict[str, Any]]:
    """The value of the column `overrides` of an API key's row."""
    return [
        {
            "rule": override.rule,
            "limits": [limit.text for limit in override.limits],
            **({} if override.until_us is None else {"until_us": override.until_us}),
            **({"quotas": [quota.text for quota in override.quotas]} if override.quotas else {}),
        }
        for override in overrides
    ]


def overrides_of(stored: Iterable[Mapping[str, Any]]) -> tuple[Override, ...]:
    """The overrides in a column that `override_rows` wrote."""
    return tuple(
        Override(
            each["rule"],
            tuple(Limit.parse(text) for text in each["limits"]),
            each.get("until_us"),
            tuple(Quota.parse(text) for text in each.get("quotas", ())),
        )
        for each in stored
    )
