"""Models of API keys."""

from __future__ import annotations

import time
from typing import Annotated, Any

from pydantic import Field, model_validator

from tidegate.admin.models.base import (
    KeyId,
    Limits,
    Name,
    PageModel,
    Reason,
    RequestModel,
    Resource,
    Row,
    TierName,
    Timestamp,
)
from tidegate.admin.models.customers import CustomerName
from tidegate.admin.models.overrides import LimitOverride, Overrides, base_limits, listed_overrides
from tidegate.policy.model import KeyStatus
from tidegate.timestamps import format_timestamp


class KeyCreate(RequestModel):
    """A new API key."""

    tier: Annotated[TierName | None, Field(description="may be omitted for the tier of the customer, also when that changes")] = (
        None
    )
    customer: CustomerName | None = None
    name: Name = ""
    expires_at: Timestamp | None = None
    limits: Limits | None = None
    overrides: Overrides = []


class KeyPatch(KeyCreate):
    """Fields of an API key to change; omitted fields keep their values. A tier of null is that of the customer."""


class OverridesRequest(RequestModel):
    """All limits that a key has of its own; omitted ones are removed."""

    limits: Limits | None = None
    overrides: Overrides = []


class RevokeRequest(RequestModel):
    """Why a key is revoked."""

    reason: Reason


class RotateRequest(RequestModel):
    """How long the old key remains valid, s; with 0 it is revoked at once."""

    grace_s: Annotated[int, Field(ge=0, le=31_536_000)] = 0


class KeyRead(Resource):
    """The record of an API key, without the key."""

    id: KeyId
    tier: str
    name: str
    status: str
    expires_at: str | None
    limits: list[str] | None
    overrides: list[LimitOverride]
    created_at: str
    revoked_at: str | None
    revoked_reason: str | None
    managed_by_file: bool
    counts_as: str
    customer: str | None = None
    inherits_tier: bool = False
    revision: int
    warnings: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _of_older_servers(cls, record: Any) -> Any:
        """Servers without `counts_as` count each key separately."""
        if isinstance(record, dict) and "counts_as" not in record and "id" in record:
            return {**record, "counts_as": record["id"]}
        return record

    @classmethod
    def of_row(cls, row: Row) -> KeyRead:
        """Of a row of `api_keys`, with the names of tier and customer as `tier_name` and `customer_name`."""
        return cls._from_columns(
            row,
            tier=row["tier_name"],
            status="expired" if _is_expired(row) else row["status"],
            expires_at=format_timestamp(row["expires_at_us"]),
            limits=base_limits(row["overrides"]),
            overrides=listed_overrides(row["overrides"]),
            created_at=format_timestamp(row["created_at_us"]),
            revoked_at=format_timestamp(row["revoked_at_us"]),
            counts_as=row["counts_as"] or row["id"],
            customer=row["customer_name"],
            inherits_tier=bool(row["inherits_tier"]),
        )


class KeyMade(KeyRead):
    """A new API key; the key itself is returned only once."""

    api_key: str


class KeyRotated(KeyMade):
    """The new key of a rotation, and the key that it replaces."""

    replaces: KeyRead


class KeyPage(PageModel[KeyRead]):
    """A page of API keys; send `next` as `after` for the next page."""


def _is_expired(row: Row) -> bool:
    """Whether a key that was not revoked has expired."""
    until_us = row["expires_at_us"]
    return row["status"] == KeyStatus.ACTIVE.value and until_us is not None and until_us * 1000 <= time.time_ns()
