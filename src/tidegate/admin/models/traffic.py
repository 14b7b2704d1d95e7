"""Models of the traffic history."""

from __future__ import annotations

from pydantic import ConfigDict

from tidegate.admin.models.base import ResponseModel


class TrafficItemRead(ResponseModel):
    """Units of a rule in a step.

    `tier` and `rule` are null for the sum of the rules that are not listed separately; `rule` is empty for units that no rule
    answered. `span_s` is the step, or 3600 where minutes were rolled up to hours.
    """

    at: str
    span_s: int
    tier: str | None
    rule: str | None
    allowed: int
    blocked: int
    over: int


class LatencyItemRead(ResponseModel):
    """Latency of the checks in a step, whatever their tier and rule."""

    at: str
    span_s: int
    checks: int
    p50_ms: float
    p90_ms: float
    p99_ms: float


class TrafficRead(ResponseModel):
    """Traffic of a range, oldest first; steps without traffic are left out."""

    step_s: int
    items: list[TrafficItemRead]
    latency: list[LatencyItemRead]


class TrafficCallerRead(ResponseModel):
    """Units of a caller."""

    model_config = ConfigDict(from_attributes=True)

    subject: str
    tier: str
    allowed: int
    blocked: int
    over: int


class TrafficCallersRead(ResponseModel):
    """The callers with the most units, highest first."""

    items: list[TrafficCallerRead]
