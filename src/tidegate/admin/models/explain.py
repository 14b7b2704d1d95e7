"""Models of explanations."""

from __future__ import annotations

from tidegate.admin.models.base import ResponseModel
from tidegate.admin.models.usage import WindowUsageRead


class ExplainedCaller(ResponseModel):
    """Whose request it is; `refused` is the code of the error that every request of this caller gets."""

    api_key_id: str | None
    name: str | None
    tier: str
    why: str
    refused: str | None


class ExplainedRule(ResponseModel):
    """A rule of the caller's tier: `result` is answers, watches, outranked or not_matched."""

    rule: str
    endpoint: str
    methods: list[str]
    match: dict[str, str]
    priority: int
    mode: str
    result: str
    reason: str


class ExplainedCounter(ResponseModel):
    """A counter that the request would be charged to; `rule` is null for the tier's own limits."""

    rule: str | None
    mode: str
    algorithm: str
    limits: list[str]
    subject: str | None
    problem: str | None
    limit: int | None
    remaining: int | None
    reset_after: float | None
    degraded: bool
    windows: list[WindowUsageRead]


class ExplainRead(ResponseModel):
    """Why a request gets its answer. `allowed` is null if it would be refused as invalid, or nothing is known of its counters."""

    allowed: bool | None
    answer: str
    method: str
    path: str
    caller: ExplainedCaller
    rule: str | None
    rules: list[ExplainedRule]
    left_out: int
    counters: list[ExplainedCounter]
