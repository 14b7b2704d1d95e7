"""Models of usage and of resets of counters."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tidegate.admin.models.base import Plain, RequestModel, ResponseModel, TierName
from tidegate.admin.models.customers import CustomerName


class WindowUsageRead(ResponseModel):
    """The usage of one limit or quota; `period` is that of a quota, null for a limit."""

    limit: int
    window: int
    used: int
    remaining: int
    resets_at: str | None
    period: str | None = None


class RuleUsageRead(ResponseModel):
    """The usage under one rule; `limit` and `remaining` are those of its limit with the lowest remaining quota, `holds` its open
    holds, null where they are not known.
    """

    rule: str | None
    endpoint: str | None
    mode: str
    subject: str
    limit: int | None
    remaining: int | None
    reset_after: float | None
    window: int | None
    degraded: bool
    holds: int | None = None
    windows: list[WindowUsageRead]


class UsageRead(ResponseModel):
    """The current usage of a caller, and how many of its checks were blocked in the last 24 h."""

    tier: str
    rules: list[RuleUsageRead]
    not_counted: list[str | None]
    truncated: bool
    blocked_24h: int


class ResetRequest(RequestModel):
    """Whose counters are reset: exactly one of these; with `namespace`, `subject` is its."""

    api_key_id: Annotated[str, Field(min_length=24, max_length=24), Plain] | None = None
    ip: Annotated[str, Field(min_length=1, max_length=45), Plain] | None = None
    tier: TierName | None = None
    customer: CustomerName | None = None
    subject: Annotated[str, Field(min_length=1, max_length=5000, examples=["user=42"]), Plain] | None = None
    namespace: Annotated[str, Field(min_length=1, max_length=64, examples=["emails"]), Plain] | None = None


class ResetRead(ResponseModel):
    """How many counters were reset, including empty ones."""

    reset: int
