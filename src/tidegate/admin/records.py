"""How rows of the catalog look to operators: plain JSON, the same in answers and in the audit log.

No form ever holds a key, a token or a digest of one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, TypeAlias

from tidegate.policy.model import KeyStatus
from tidegate.timestamps import format_timestamp

Form: TypeAlias = dict[str, Any]


def tier_form(row: Mapping[Any, Any]) -> Form:
    """A tier.

    Args:
        row: of `tiers`.

    Returns:
        Its form.
    """
    return {
        "name": row["name"],
        "limits": list(row["limits"]),
        "managed_by_file": row["managed_by_file"],
        "revision": row["revision"],
    }


def rule_form(row: Mapping[Any, Any]) -> Form:
    """A rule.

    Args:
        row: of `rate_limit_rules`, with the tier's name as `tier_name`.

    Returns:
        Its form.
    """
    return {
        "id": row["id"],
        "tier": row["tier_name"],
        "name": row["name"],
        "endpoint": row["endpoint_pattern"],
        "methods": list(row["methods"]),
        "algorithm": row["algorithm"],
        "limits": list(row["limits"]),
        "subject": row["subject"],
        "priority": row["priority"],
        "mode": row["mode"],
        "on_failure": row["on_failure"],
        "managed_by_file": row["managed_by_file"],
        "revision": row["revision"],
    }


def key_form(row: Mapping[Any, Any]) -> Form:
    """An API key, without the key.

    Args:
        row: of `api_keys`, with the tier's name as `tier_name`.

    Returns:
        Its form; `limits` are those that hold instead of the tier's own, `overrides` those that hold instead of a rule's.
    """
    own = [override for override in row["overrides"] if not override["rule"]]
    return {
        "id": row["id"],
        "tier": row["tier_name"],
        "name": row["name"],
        "status": "expired" if _is_over(row) else row["status"],
        "expires_at": format_timestamp(row["expires_at_us"]),
        "limits": list(own[0]["limits"]) if own else None,
        "overrides": [
            {"rule": override["rule"], "limits": list(override["limits"])} for override in row["overrides"] if override["rule"]
        ],
        "created_at": format_timestamp(row["created_at_us"]),
        "revoked_at": format_timestamp(row["revoked_at_us"]),
        "revoked_reason": row["revoked_reason"],
        "managed_by_file": row["managed_by_file"],
        "counts_as": row["counts_as"] or row["id"],
        "revision": row["revision"],
    }


def _is_over(row: Mapping[Any, Any]) -> bool:
    """Whether an active key's time is over."""
    until_us = row["expires_at_us"]
    return row["status"] == KeyStatus.ACTIVE.value and until_us is not None and until_us * 1000 <= time.time_ns()


def token_form(row: Mapping[Any, Any]) -> Form:
    """An operator's token, without the token.

    Args:
        row: of `admin_tokens`.

    Returns:
        Its form.
    """
    return {
        "id": row["id"],
        "name": row["name"],
        "role": row["role"],
        "created_at": format_timestamp(row["created_at_us"]),
        "expires_at": format_timestamp(row["expires_at_us"]),
        "revoked_at": format_timestamp(row["revoked_at_us"]),
    }


def audit_form(row: Mapping[Any, Any]) -> Form:
    """A row of the audit log.

    Args:
        row: of `audit_log`.

    Returns:
        Its form.
    """
    return {
        "id": row["id"],
        "at": format_timestamp(row["at_us"]),
        "actor": row["actor"],
        "action": row["action"],
        "kind": row["kind"],
        "target": row["target"],
        "before": row["before"],
        "after": row["after"],
    }
