"""What the control plane takes and gives, as models that its OpenAPI description is made from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetJsonSchemaHandler, JsonValue, model_validator
from pydantic_core import CoreSchema

MAX_LIMITS = 16


def _plain(text: str) -> str:
    # PostgreSQL takes no NUL, and no other control character belongs into a name either.
    if any(ord(character) < 0x20 or ord(character) == 0x7F for character in text):
        raise ValueError("must not have control characters")
    return text


Plain = AfterValidator(_plain)
Name = Annotated[str, Field(max_length=200), Plain]
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


class Given(BaseModel):
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


class Told(BaseModel):
    """What goes out."""

    model_config = ConfigDict(extra="forbid")


class TierCreate(Given):
    """A tier to be made."""

    name: TierName
    limits: Limits = []


class TierLimits(Given):
    """Other limits for a tier."""

    limits: Limits


class TierRead(Told):
    """A tier. `limits` hold over all its endpoints; its rules stand in /rate-limit-rules."""

    name: str
    limits: list[str]
    managed_by_file: bool
    revision: int
    warnings: list[str] = []


class RuleFields(Given):
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


class RulePatch(Given):
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


class RuleRead(Told):
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


class OverrideForm(Given):
    """Limits that hold for one API key instead of a rule's."""

    rule: RuleName
    limits: Annotated[list[LimitText], Field(min_length=1, max_length=MAX_LIMITS)]


Overrides = Annotated[list[OverrideForm], Field(max_length=1000)]


class KeyCreate(Given):
    """An API key to be made."""

    tier: TierName
    name: Name = ""
    expires_at: Moment | None = None
    limits: Limits | None = None
    overrides: Overrides = []


class KeyPatch(Given):
    """Fields of an API key that are to change; those left out stay."""

    tier: TierName = ""
    name: Name = ""
    expires_at: Moment | None = None
    limits: Limits | None = None
    overrides: Overrides = []


class OverridesRequest(Given):
    """All that a key has of its own; what is left out is taken away."""

    limits: Limits | None = None
    overrides: Overrides = []


class KeyRead(Told):
    """An API key, without the key."""

    id: str
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


class KeyMade(KeyRead):
    """An API key that was just made: the key itself is told this once."""

    api_key: str


class KeyRotated(KeyMade):
    """The new key of a rotation, and the one that it replaces."""

    replaces: KeyRead


class RevokeRequest(Given):
    """Why a key is revoked."""

    reason: Annotated[str, Field(min_length=1, max_length=1000), Plain]


class RotateRequest(Given):
    """How long the old key still works, s; with 0 it is revoked now."""

    grace_s: Annotated[int, Field(ge=0, le=31_536_000)] = 0


class TokenCreate(Given):
    """A token to be made."""

    name: Annotated[str, Field(min_length=1, max_length=200), Plain]
    role: Role = "viewer"
    expires_at: Moment | None = None


class TokenRead(Told):
    """A token of the control plane, without the token."""

    id: int
    name: str
    role: str
    created_at: str
    expires_at: str | None
    revoked_at: str | None


class TokenMade(TokenRead):
    """A token that was just made: the token itself is told this once."""

    token: str


class AuditRead(Told):
    """A change: who made it, what was before and what is after."""

    id: int
    at: str
    actor: str
    action: str
    kind: str
    target: str
    before: dict[str, JsonValue] | None
    after: dict[str, JsonValue] | None


class ViolationRead(Told):
    """A minute in which a rule blocked a subject."""

    minute: str
    tier: str
    rule: str
    subject: str
    blocked: int


class ViolatorRead(Told):
    """How often something was blocked; what it was not counted by is null."""

    subject: str | None
    tier: str | None
    rule: str | None
    blocked: int


class TopRead(Told):
    """Who was blocked most, the most first."""

    items: list[ViolatorRead]


class TierPage(Told):
    """A page of tiers; `next` is what to give as `after`."""

    items: list[TierRead]
    next: str | None


class RulePage(Told):
    """A page of rules; `next` is what to give as `after`."""

    items: list[RuleRead]
    next: str | None


class KeyPage(Told):
    """A page of API keys; `next` is what to give as `after`."""

    items: list[KeyRead]
    next: str | None


class TokenPage(Told):
    """A page of tokens; `next` is what to give as `after`."""

    items: list[TokenRead]
    next: str | None


class AuditPage(Told):
    """A page of the audit log, the newest first; `next` is what to give as `after`."""

    items: list[AuditRead]
    next: str | None


class ViolationPage(Told):
    """A page of violations, the newest first; `next` is what to give as `after`."""

    items: list[ViolationRead]
    next: str | None


class WindowUsageRead(Told):
    """What is left of one limit."""

    limit: int
    window: int
    used: int
    remaining: int
    resets_at: str | None


class RuleUsageRead(Told):
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


class UsageRead(Told):
    """What is left to a caller now, and how often it was blocked within the last 24 h."""

    tier: str
    rules: list[RuleUsageRead]
    not_counted: list[str | None]
    truncated: bool
    blocked_24h: int


class ResetRequest(Given):
    """Whose counters are to be reset: exactly one of the three."""

    api_key_id: Annotated[str, Field(min_length=24, max_length=24), Plain] | None = None
    ip: Annotated[str, Field(min_length=1, max_length=45), Plain] | None = None
    tier: TierName | None = None


class ResetRead(Told):
    """How many counters were reset, whether they held anything or not."""

    reset: int


class ChangeRead(Told):
    """One change of an import."""

    action: str
    kind: str
    target: str
    before: dict[str, JsonValue] | None
    after: dict[str, JsonValue] | None


class ImportRead(Told):
    """What an import changed, or would change."""

    dry_run: bool
    changes: list[ChangeRead]
    warnings: list[str]


class Problem(Told):
    """What was wrong, for a program and for a person."""

    code: str
    message: str
    details: dict[str, Any]


class ProblemRead(Told):
    """The form of every error."""

    error: Problem
