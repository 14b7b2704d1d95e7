"""How rows of the catalog look to operators: plain JSON, the same in answers and in the audit log.

No form ever holds a key, a token or a digest of one.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from tidegate.errors import BadRequest
from tidegate.limits import US_PER_S
from tidegate.policy import KeyStatus

Form: TypeAlias = dict[str, Any]

FIRST_US: Final = -62_135_596_800_000_000
"""0001-01-01T00:00:00Z, µs since the epoch: ISO 8601 writes nothing before it with four digits."""
LAST_US: Final = 253_402_300_799_999_999
"""9999-12-31T23:59:59.999999Z: nor behind it."""

_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


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
        "expires_at": moment_text(row["expires_at_us"]),
        "limits": list(own[0]["limits"]) if own else None,
        "overrides": [
            {"rule": override["rule"], "limits": list(override["limits"])} for override in row["overrides"] if override["rule"]
        ],
        "created_at": moment_text(row["created_at_us"]),
        "revoked_at": moment_text(row["revoked_at_us"]),
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
        "created_at": moment_text(row["created_at_us"]),
        "expires_at": moment_text(row["expires_at_us"]),
        "revoked_at": moment_text(row["revoked_at_us"]),
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
        "at": moment_text(row["at_us"]),
        "actor": row["actor"],
        "action": row["action"],
        "kind": row["kind"],
        "target": row["target"],
        "before": row["before"],
        "after": row["after"],
    }


def moment_text(at_us: int | None) -> str | None:
    """A moment as answers write it.

    Args:
        at_us: µs since the epoch, or None.

    Returns:
        ISO 8601 in UTC, such as `2030-01-31T00:00:00Z`, the nearest that it can write; None for None.
    """
    if at_us is None:
        return None
    whole_s, rest_us = divmod(min(max(at_us, FIRST_US), LAST_US), US_PER_S)
    moment = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=whole_s, microseconds=rest_us)
    return moment.isoformat() + "Z"


def us_of(moment: datetime.datetime) -> int:
    """µs since the epoch.

    Args:
        moment: with an offset; its time in UTC in the years 1 to 9999.

    Returns:
        The µs, exactly.

    Raises:
        ValueError: if it has no offset, or another year: an offset can carry it there.
    """
    if moment.tzinfo is None:
        raise ValueError("it has no offset")
    since = moment - _EPOCH
    at_us = (since.days * 86_400 + since.seconds) * US_PER_S + since.microseconds
    if not FIRST_US <= at_us <= LAST_US:
        raise ValueError("it is not in the years 1 to 9999 of UTC")
    return at_us


def moment_us(text: str, field: str) -> int:
    """Read a moment.

    Args:
        text: ISO 8601 with an offset, such as `2030-01-31T00:00:00Z`.
        field: its name, for the error.

    Returns:
        µs since the epoch.

    Raises:
        BadRequest: naming the field, its value and the form.
    """
    try:
        return us_of(datetime.datetime.fromisoformat(text))
    except ValueError:
        raise BadRequest(
            f"{field} {text[:60]!r} is no moment of the years 1 to 9999: write 2030-01-31T00:00:00Z, with its offset", field=field
        ) from None
