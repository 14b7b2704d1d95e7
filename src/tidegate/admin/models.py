"""What the control plane takes and gives, as models that its OpenAPI description is made from."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Annotated, Any, Generic, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetJsonSchemaHandler, JsonValue, model_validator
from pydantic_core import CoreSchema

from tidegate.policy.model import KeyStatus
from tidegate.timestamps import format_timestamp

MAX_LIMITS = 16

JsonObject: TypeAlias = dict[str, Any]
Row: TypeAlias = Mapping[Any, Any]

_KEY_ID = re.compile(r"[0-9a-f]{24}", re.ASCII)
_Item = TypeVar("_Item")


def _plain(text: str) -> str:
    # PostgreSQL takes no NUL, and no other control character belongs into a name either.
    if any(ord(character) < 0x20 or ord(character) == 0x7F for character in text):
        raise ValueError("must not have control characters")
    return text


def is_key_id(text: str) -> bool:
    """Whether a text has the form of an API key's id: 24 hex digits."""
    return _KEY_ID.fullmatch(text) is not None


def _key_id(text: str) -> str:
    # The command line puts it into a path.
    if not is_key_id(text):
        raise ValueError("must have 24 hex digits")
    return text


Plain = AfterValidator(_plain)
KeyId = Annotated[str, AfterValidator(_key_id)]
Name = Annotated[str, Field(max_length=200), Plain]
Reason = Annotated[str, Field(min_length=1, max_length=1000), Plain]
TierName = Annotated[str, Field(min_length=1, max_length=64), Plain]
RuleName = Annotated[str, Field(min_length=1, max_length=256), Plain]
LimitText = Annotated[str, Field(max_length=80, examples=["100/minute"]), Plain]
Limits = Annotated[list[LimitText], Field(max_length=MAX_LIMITS)]
Moment = Annotated[str, Field(max_length=40, examples=["2030-01-31T00:00:00Z"], description="ISO 8601 with its offset"), Plain]
Algorithm = Literal["fixed_window", "sliding_window", "sliding_log", "token_bucket", "leaky_bucket"]
Subject = Literal["api_key", "ip", "tier"]
Mode = Literal["enforce", "shadow"]
OnFailure = Literal["default", "local", "allow", "deny"]
Role = Literal["viewer", "operator"]


class RequestModel(BaseModel):
    """What comes in: exact types, no field that is not known. Null counts as left out where the default is not null."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """Some writers fill in every field that they know."""
        if not isinstance(given, dict):
            return given
        left_out = cls._defaulted()
        return {name: value for name, value in given.items() if value is not None or name not in left_out}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The same in the description: these fields take null."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name in cls._defaulted() & properties.keys():
            described = dict(properties[name])
            outside = {key: described.pop(key) for key in ("default", "title") if key in described}
            properties[name] = {"anyOf": [described, {"type": "null"}], **outside}
        return schema

    @classmethod
    def _defaulted(cls) -> frozenset[str]:
        return frozenset(
            name for name, field in cls.model_fields.items() if not field.is_required() and field.default is not None
        )


class ResponseModel(BaseModel):
    """What the control plane sends. The command line reads the same models, and ignores the fields of later versions."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"additionalProperties": False})


class Resource(ResponseModel):
    """A row of the catalog as operators see it, in answers and in the audit log. It never has a key, a token or a digest."""

    def audited(self) -> JsonObject:
        """The fields that the audit log keeps: all but the warnings of one answer."""
        return self.model_dump(exclude={"warnings"})


class TierCreate(RequestModel):
    """A tier to be made."""

    name: TierName
    limits: Limits = []


class TierLimits(RequestModel):
    """Other limits for a tier."""

    limits: Limits


class TierRead(Resource):
    """A tier. `limits` hold over all its endpoints; its rules stand in /rate-limit-rules."""

    name: str
    limits: list[str]
    managed_by_file: bool
    revision: int
    warnings: list[str] = []

    @classmethod
    def of_row(cls, row: Row) -> TierRead:
        """Of a row of `tiers`."""
        return cls(
            name=row["name"],
            limits=list(row["limits"]),
            managed_by_file=row["managed_by_file"],
            revision=row["revision"],
        )


class RuleFields(RequestModel):
    """What can be said of a rule; every field as in the policy file."""

    endpoint: Annotated[str, Field(max_length=1024, examples=["/api/v1/*"]), Plain]
    limits: Annotated[list[LimitText], Field(min_length=1, max_length=MAX_LIMITS)]
    methods: Annotated[list[Annotated[str, Field(max_length=32), Plain]], Field(max_length=32)] = []
    algorithm: Algorithm = "sliding_window"
    subject: Subject = "api_key"
    priority: Annotated[int, Field(ge=-1_000_000, le=1_000_000)] = 0
    mode: Mode = "enforce"
    on_failure: OnFailure = "default"
    name: RuleName | None = None


class RuleCreate(RuleFields):
    """A rule to be made."""

    tier: TierName


class RulePatch(RequestModel):
    """Fields of a rule that are to change; those left out stay."""

    endpoint: Annotated[str, Field(max_length=1024), Plain] = ""
    limits: Annotated[list[LimitText], Field(min_length=1, max_length=MAX_LIMITS)] = []
    methods: Annotated[list[Annotated[str, Field(max_length=32), Plain]], Field(max_length=32)] = []
    algorithm: Algorithm = "sliding_window"
    subject: Subject = "api_key"
    priority: Annotated[int, Field(ge=-1_000_000, le=1_000_000)] = 0
    mode: Mode = "enforce"
    on_failure: OnFailure = "default"
    name: RuleName | None = None


class RuleRead(Resource):
    """A rule."""

    id: int
    tier: str
    name: str
    endpoint: str
    methods: list[str]
    algorithm: str
    limits: list[str]
    subject: str
    priority: int
    mode: str
    on_failure: str
    managed_by_file: bool
    revision: int
    warnings: list[str] = []

    @classmethod
    def of_row(cls, row: Row) -> RuleRead:
        """Of a row of `rate_limit_rules`, with the tier's name as `tier_name`."""
        return cls(
            id=row["id"],
            tier=row["tier_name"],
            name=row["name"],
            endpoint=row["endpoint_pattern"],
            methods=list(row["methods"]),
            algorithm=row["algorithm"],
            limits=list(row["limits"]),
            subject=row["subject"],
            priority=row["priority"],
            mode=row["mode"],
            on_failure=row["on_failure"],
            managed_by_file=row["managed_by_file"],
            revision=row["revision"],
        )


class OverrideForm(RequestModel):
    """Limits that hold for one API key instead of a rule's."""

    rule: RuleName
    limits: Annotated[list[LimitText], Field(min_length=1, max_length=MAX_LIMITS)]


Overrides = Annotated[list[OverrideForm], Field(max_length=1000)]


class KeyCreate(RequestModel):
    """An API key to be made."""

    tier: TierName
    name: Name = ""
    expires_at: Moment | None = None
    limits: Limits | None = None
    overrides: Overrides = []


class KeyPatch(RequestModel):
    """Fields of an API key that are to change; those left out stay."""

    tier: TierName = ""
    name: Name = ""
    expires_at: Moment | None = None
    limits: Limits | None = None
    overrides: Overrides = []


class OverridesRequest(RequestModel):
    """All that a key has of its own; what is left out is taken away."""

    limits: Limits | None = None
    overrides: Overrides = []


class KeyRead(Resource):
    """An API key, without the key."""

    id: KeyId
    tier: str
    name: str
    status: str
    expires_at: str | None
    limits: list[str] | None
    overrides: list[OverrideForm]
    created_at: str
    revoked_at: str | None
    revoked_reason: str | None
    managed_by_file: bool
    counts_as: str
    revision: int
    warnings: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _of_older_servers(cls, record: Any) -> Any:
        """A server before rotation kept counters has no `counts_as`: each key counts as itself."""
        if isinstance(record, dict) and "counts_as" not in record and "id" in record:
            return {**record, "counts_as": record["id"]}
        return record

    @classmethod
    def of_row(cls, row: Row) -> KeyRead:
        """Of a row of `api_keys`, with the tier's name as `tier_name`."""
        own = next((each["limits"] for each in row["overrides"] if not each["rule"]), None)
        return cls(
            id=row["id"],
            tier=row["tier_name"],
            name=row["name"],
            status="expired" if _is_expired(row) else row["status"],
            expires_at=format_timestamp(row["expires_at_us"]),
            limits=None if own is None else list(own),
            # Not validated again: the catalog's rows were validated when they were written.
            overrides=[
                OverrideForm.model_construct(rule=each["rule"], limits=list(each["limits"]))
                for each in row["overrides"]
                if each["rule"]
            ],
            created_at=format_timestamp(row["created_at_us"]),
            revoked_at=format_timestamp(row["revoked_at_us"]),
            revoked_reason=row["revoked_reason"],
            managed_by_file=row["managed_by_file"],
            counts_as=row["counts_as"] or row["id"],
            revision=row["revision"],
        )


class KeyMade(KeyRead):
    """An API key that was just made: the key itself is told this once."""

    api_key: str


class KeyRotated(KeyMade):
    """The new key of a rotation, and the one that it replaces."""

    replaces: KeyRead


class RevokeRequest(RequestModel):
    """Why a key is revoked."""

    reason: Reason


class RotateRequest(RequestModel):
    """How long the old key still works, s; with 0 it is revoked now."""

    grace_s: Annotated[int, Field(ge=0, le=31_536_000)] = 0


class TokenCreate(RequestModel):
    """A token to be made."""

    name: Annotated[str, Field(min_length=1, max_length=200), Plain]
    role: Role = "viewer"
    expires_at: Moment | None = None


class TokenRead(Resource):
    """A token of the control plane, without the token."""

    id: int
    name: str
    role: str
    created_at: str
    expires_at: str | None
    revoked_at: str | None

    @classmethod
    def of_row(cls, row: Row) -> TokenRead:
        """Of a row of `admin_tokens`."""
        return cls(
            id=row["id"],
            name=row["name"],
            role=row["role"],
            created_at=format_timestamp(row["created_at_us"]),
            expires_at=format_timestamp(row["expires_at_us"]),
            revoked_at=format_timestamp(row["revoked_at_us"]),
        )


class TokenMade(TokenRead):
    """A token that was just made: the token itself is told this once."""

    token: str


class AuditRead(ResponseModel):
    """A change: who made it, what was before and what is after."""

    id: int
    at: str
    actor: str
    action: str
    kind: str
    target: str
    before: dict[str, JsonValue] | None
    after: dict[str, JsonValue] | None

    @classmethod
    def of_row(cls, row: Row) -> AuditRead:
        """Of a row of `audit_log`."""
        return cls(
            id=row["id"],
            at=format_timestamp(row["at_us"]),
            actor=row["actor"],
            action=row["action"],
            kind=row["kind"],
            target=row["target"],
            before=row["before"],
            after=row["after"],
        )


class ViolationRead(ResponseModel):
    """A minute in which a rule blocked a subject."""

    minute: str
    tier: str
    rule: str
    subject: str
    blocked: int


class ViolatorRead(ResponseModel):
    """How often something was blocked; what it was not counted by is null."""

    subject: str | None
    tier: str | None
    rule: str | None
    blocked: int


class TopRead(ResponseModel):
    """Who was blocked most, the most first."""

    items: list[ViolatorRead]


class PageModel(ResponseModel, Generic[_Item]):
    """A page of a list; `next` is what to send as `after` for the next page, null on the last one."""

    items: list[_Item]
    next: str | None


class TierPage(PageModel[TierRead]):
    """A page of tiers; `next` is what to give as `after`."""


class RulePage(PageModel[RuleRead]):
    """A page of rules; `next` is what to give as `after`."""


class KeyPage(PageModel[KeyRead]):
    """A page of API keys; `next` is what to give as `after`."""


class TokenPage(PageModel[TokenRead]):
    """A page of tokens; `next` is what to give as `after`."""


class AuditPage(PageModel[AuditRead]):
    """A page of the audit log, the newest first; `next` is what to give as `after`."""


class ViolationPage(PageModel[ViolationRead]):
    """A page of violations, the newest first; `next` is what to give as `after`."""


class WindowUsageRead(ResponseModel):
    """What is left of one limit."""

    limit: int
    window: int
    used: int
    remaining: int
    resets_at: str | None


class RuleUsageRead(ResponseModel):
    """What is left under one rule; of its limits the one with the least left."""

    rule: str | None
    endpoint: str | None
    mode: str
    subject: str
    limit: int | None
    remaining: int | None
    reset_after: float | None
    window: int | None
    degraded: bool
    windows: list[WindowUsageRead]


class UsageRead(ResponseModel):
    """What is left to a caller now, and how often it was blocked within the last 24 h."""

    tier: str
    rules: list[RuleUsageRead]
    not_counted: list[str | None]
    truncated: bool
    blocked_24h: int


class ResetRequest(RequestModel):
    """Whose counters are to be reset: exactly one of the three."""

    api_key_id: Annotated[str, Field(min_length=24, max_length=24), Plain] | None = None
    ip: Annotated[str, Field(min_length=1, max_length=45), Plain] | None = None
    tier: TierName | None = None


class ResetRead(ResponseModel):
    """How many counters were reset, whether they held anything or not."""

    reset: int


class ChangeRead(ResponseModel):
    """One change of an import."""

    action: str
    kind: str
    target: str
    before: dict[str, JsonValue] | None
    after: dict[str, JsonValue] | None


class ImportRead(ResponseModel):
    """What an import changed, or would change."""

    dry_run: bool
    changes: list[ChangeRead]
    warnings: list[str]


class Problem(ResponseModel):
    """What was wrong, for a program and for a person."""

    code: str
    message: str
    details: dict[str, Any]


class ProblemRead(ResponseModel):
    """The form of every error."""

    error: Problem


def _is_expired(row: Row) -> bool:
    """Whether a key that was not revoked has expired."""
    until_us = row["expires_at_us"]
    return row["status"] == KeyStatus.ACTIVE.value and until_us is not None and until_us * 1000 <= time.time_ns()
