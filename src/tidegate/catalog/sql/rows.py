"""Converts between the records of `policy` and the rows of `tables`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from tidegate.policy.limits import Algorithm, Limit, OnFailure
from tidegate.policy.model import ApiKey, KeyStatus, Mode, Override, Rule, Subject, Tier

RULE_COLUMNS: Final = ("endpoint_pattern", "methods", "algorithm", "limits", "subject", "priority", "mode", "on_failure")
"""Columns with the fields of a rule."""
KEY_COLUMNS: Final = ("tier_id", "name", "status", "expires_at_us", "overrides")
"""Columns with the fields of an API key."""


def tier_of(row: Mapping[Any, Any], rules: Iterable[Mapping[Any, Any]]) -> Tier:
    """The tier in a row of `tiers` and its rows of `rate_limit_rules`, in order."""
    return Tier(
        name=row["name"],
        rules=tuple(rule_of(rule) for rule in rules),
        limits=tuple(Limit.parse(text) for text in row["limits"]),
        managed_by_file=row["managed_by_file"],
    )


def rule_of(row: Mapping[Any, Any]) -> Rule:
    """The rule in a row of `rate_limit_rules`."""
    return Rule(
        endpoint=row["endpoint_pattern"],
        limits=tuple(Limit.parse(text) for text in row["limits"]),
        methods=tuple(row["methods"]),
        algorithm=Algorithm(row["algorithm"]),
        subject=Subject(row["subject"]),
        priority=row["priority"],
        mode=Mode(row["mode"]),
        on_failure=OnFailure(row["on_failure"]),
        name=row["name"],
    )


def api_key_of(row: Mapping[Any, Any]) -> ApiKey:
    """The API key in a row.

    Args:
        row: row of `api_keys`, with the tier's name as `tier_name`.
    """
    return ApiKey(
        sha256=row["sha256"],
        tier=row["tier_name"],
        status=KeyStatus(row["status"]),
        name=row["name"],
        expires_at_us=row["expires_at_us"],
        overrides=tuple(
            Override(override["rule"], tuple(Limit.parse(text) for text in override["limits"])) for override in row["overrides"]
        ),
        managed_by_file=row["managed_by_file"],
        counts_as=row["counts_as"] or "",
    )


def row_of_tier(tier: Tier) -> dict[str, Any]:
    """The values of a tier's row, without its id."""
    return {"name": tier.name, "limits": [limit.text for limit in tier.limits], "managed_by_file": tier.managed_by_file}


def row_of_rule(rule: Rule, tier_id: int, position: int) -> dict[str, Any]:
    """The values of a rule's row that is owned by the policy file, without its id."""
    return {
        "tier_id": tier_id,
        "name": rule.name,
        "endpoint_pattern": rule.endpoint,
        "methods": list(rule.methods),
        "algorithm": rule.algorithm.value,
        "limits": [limit.text for limit in rule.limits],
        "subject": rule.subject.value,
        "priority": rule.priority,
        "mode": rule.mode.value,
        "on_failure": rule.on_failure.value,
        "position": position,
        "managed_by_file": True,
    }


def row_of_api_key(api_key: ApiKey, tier_id: int, created_at_us: int) -> dict[str, Any]:
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
    }


def override_rows(overrides: Iterable[Override]) -> list[dict[str, Any]]:
    """The value of the column `overrides` of an API key's row."""
    return [{"rule": override.rule, "limits": [limit.text for limit in override.limits]} for override in overrides]
