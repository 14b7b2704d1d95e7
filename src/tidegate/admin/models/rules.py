"""Models of rules."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tidegate.admin.models.base import (
    Algorithm,
    Limits,
    Match,
    Mode,
    OnFailure,
    OnMissing,
    OverageField,
    PageModel,
    Plain,
    Quotas,
    RequestModel,
    Resource,
    Row,
    RuleName,
    Subject,
    TierName,
)
from tidegate.catalog.sql.rows import subject_value_of
from tidegate.policy.failures import MAX_PENALTIES, MAX_STATUSES, NO_FAILURES, FailureCount


class RuleFields(RequestModel):
    """The fields of a rule, with the same meanings as in the policy file."""

    endpoint: Annotated[str, Field(max_length=1024, examples=["/api/v1/*"]), Plain]
    limits: Annotated[Limits, Field(description="a rule has limits, quotas or both")] = []
    methods: Annotated[list[Annotated[str, Field(max_length=32), Plain]], Field(max_length=32)] = []
    algorithm: Algorithm = "sliding_window"
    subject: Subject = "api_key"
    priority: Annotated[int, Field(ge=-1_000_000, le=1_000_000)] = 0
    mode: Mode = "enforce"
    on_failure: OnFailure = "default"
    name: RuleName | None = None
    match: Match = {}
    on_missing: OnMissing = "ip"
    quotas: Quotas = []
    overage: OverageField = False
    leases: bool = True
    action: Annotated[
        Literal["allow", "deny"] | None, Field(description="in place of limits and quotas: allow without counting, or deny")
    ] = None
    count: Annotated[
        Literal["requests", "failures"],
        Field(description="failures: an attempt counts while it is in progress, and after it where it failed"),
    ] = "requests"
    statuses: Annotated[
        list[Annotated[int, Field(ge=100, le=599)]],
        Field(max_length=MAX_STATUSES, description="of responses that are failures; 401 and 403 if empty"),
    ] = []
    clear_on_success: Annotated[bool, Field(description="whether a success forgets the failures before it")] = False
    penalty: Annotated[
        list[Annotated[str, Field(max_length=20, examples=["5m"]), Plain]],
        Field(max_length=MAX_PENALTIES, description="for how long a caller is denied that reaches a limit of failures"),
    ] = []


class RuleCreate(RuleFields):
    """A new rule."""

    tier: TierName


class RulePatch(RuleFields):
    """Fields of a rule to change; omitted fields keep their values."""

    endpoint: Annotated[str, Field(max_length=1024), Plain] = ""
    limits: Limits = []


class RuleRead(Resource):
    """A rule."""

    id: int
    tier: str
    name: str
    endpoint: str
    methods: list[str]
    algorithm: str
    limits: list[str]
    subject: str | list[str]
    priority: int
    mode: str
    on_failure: str
    match: dict[str, str] = {}
    on_missing: str = "ip"
    managed_by_file: bool
    revision: int
    warnings: list[str] = []
    quotas: list[str] = []
    overage: bool | dict[str, str] = False
    leases: bool = True
    action: str | None = None
    count: str = "requests"
    statuses: list[int] = []
    clear_on_success: bool = False
    penalty: list[str] = []

    @classmethod
    def of_row(cls, row: Row) -> RuleRead:
        """Of a row of `rate_limit_rules`, with the tier's name as `tier_name`."""
        failures = FailureCount.of_stored(row["failures"])
        return cls._from_columns(
            row,
            tier=row["tier_name"],
            endpoint=row["endpoint_pattern"],
            subject=subject_value_of(row),
            match=row["match_attributes"] or {},
            on_missing=row["on_missing"] or "ip",
            quotas=row["quotas"] or [],
            overage=row["overage"] or False,
            leases=row["leases"] in (None, True),
            **(NO_FAILURES if failures is None else failures.fields),
        )


class RulePage(PageModel[RuleRead]):
    """A page of rules; send `next` as `after` for the next page."""
