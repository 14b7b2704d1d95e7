"""Models of namespaces, and of what the policy says of callers without an API key."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tidegate.admin.models.base import (
    Algorithm,
    Limits,
    OnFailure,
    PageModel,
    Plain,
    RequestModel,
    Resource,
    ResponseModel,
    Row,
    RuleLimits,
)

NamespaceName = Annotated[
    str, Field(min_length=1, max_length=64, examples=["emails"], description="letters, digits, '_', '.', '-'"), Plain
]
MAX_OVERRIDES_OF_REQUEST = 10_000


class NamespaceOverrideFields(RequestModel):
    """Limits for some subjects of a namespace."""

    subject: Annotated[
        str, Field(min_length=1, max_length=256, examples=["vip-*"], description="`*` matches any run of characters"), Plain
    ]
    limits: RuleLimits


class NamespaceFields(RequestModel):
    """The fields of a namespace; without `limits`, each request brings its own."""

    limits: Limits = []
    algorithm: Algorithm = "sliding_window"
    on_failure: OnFailure = "default"
    overrides: Annotated[
        list[NamespaceOverrideFields],
        Field(
            max_length=MAX_OVERRIDES_OF_REQUEST, description="an exact subject comes before one with `*`, then the earlier one"
        ),
    ] = []


class NamespaceCreate(NamespaceFields):
    """A new namespace."""

    name: NamespaceName


class NamespacePatch(RequestModel):
    """Fields of a namespace to change; `overrides` replaces all of them."""

    limits: Limits | None = None
    algorithm: Algorithm | None = None
    on_failure: OnFailure | None = None
    overrides: Annotated[list[NamespaceOverrideFields], Field(max_length=MAX_OVERRIDES_OF_REQUEST)] | None = None


class NamespaceOverrideRead(ResponseModel):
    """Limits for some subjects of a namespace."""

    subject: str
    limits: list[str]


class NamespaceRead(Resource):
    """A namespace: limits for subjects that back ends name in `POST /v1/limit`."""

    name: str
    limits: list[str]
    algorithm: str
    on_failure: str
    overrides: list[NamespaceOverrideRead]
    managed_by_file: bool
    revision: int

    @classmethod
    def of_row(cls, row: Row) -> NamespaceRead:
        """Of an entry of `policy_state.namespaces`."""
        return cls.model_validate(dict(row))


class NamespacePage(PageModel[NamespaceRead]):
    """A page of namespaces; send `next` as `after` for the next page."""


class JwtRead(ResponseModel):
    """Which tokens are accepted: the table `[jwt]`."""

    jwks: str
    issuer: str
    audience: list[str]
    header: str
    algorithms: list[str]
    leeway_s: int


class CallersRead(ResponseModel):
    """What the policy says of callers without an API key: the tables [anonymous], [callers], [attributes] and [jwt]."""

    anonymous_tier: str | None
    tier_from: str | None
    default_tier: str | None
    attributes: dict[str, str]
    jwt: JwtRead | None
    managed_by_file: bool
