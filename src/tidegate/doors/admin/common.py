"""Shared by all routes of the control plane: the principal, expected revisions, paging and filters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Final, TypeVar

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.params import Depends as Dependency
from fastapi.security import HTTPBearer

from tidegate.admin.models import CustomerRead, KeyMade, KeyRead, KeyRotated, Plain, ProblemRead, RuleRead, TierRead
from tidegate.admin.models.namespaces import NamespaceRead
from tidegate.admin.models.subject_overrides import SubjectOverrideRead
from tidegate.admin.tokens import Principal
from tidegate.admin.transaction import StaleRevision
from tidegate.catalog.sql.paging import MAX_PAGE
from tidegate.doors.admin.guard import READING, principal_of, require_operator
from tidegate.errors import BadRequest, TidegateError, clip

_Tagged = TypeVar("_Tagged", CustomerRead, TierRead, RuleRead, KeyRead, KeyMade, KeyRotated, NamespaceRead, SubjectOverrideRead)

PREFIX: Final = "/admin/v1"

_TAG: Final = re.compile(r'(W/)?"([0-9]{0,18})"', re.ASCII)

REF: Final = "#/components/schemas/{model}"
"""How the description names a model."""


def _problem(description: str) -> dict[str, Any]:
    """An answer whose body is a `ProblemRead`.

    FastAPI would make a validator of each `model`, for each status of each operation twice: most of what a start of the control
    plane takes. It validates no answers of errors; the reference is all that the description needs.
    """
    return {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": REF.format(model=ProblemRead.__name__)}}},
    }


ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    400: _problem("The request is not valid; the message explains why."),
    401: _problem("The token is missing, unknown, expired or revoked."),
    403: _problem("Tokens of viewers may only read."),
    404: _problem("The resource does not exist."),
    408: _problem("The body was not received in time."),
    409: _problem("The request conflicts with the state of the catalog; the message explains what to do first."),
    413: _problem("The body has more than 1 MB."),
    415: _problem("The body has a Content-Encoding."),
    429: _problem("Too many requests, or requests with a wrong token; see Retry-After."),
    503: _problem("The catalog or the counter store does not answer."),
}
EDIT_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    412: _problem("The resource was changed since it was read: read it again."),
    428: _problem("If-Match is missing: send the ETag that was read."),
}

# Only for the OpenAPI description: the guard has authenticated the token before.
BEARER: Final = HTTPBearer(auto_error=False, description="TIDEGATE_ADMIN__TOKEN, or a token of /admin/v1/tokens")


class RevisionMissing(TidegateError):
    """A change without the revision that was read."""

    code = "IF_MATCH_MISSING"
    status = 428


# Dependencies are async although they wait for nothing: FastAPI runs others in a thread each, which takes more time than they do.
async def _actor_of(request: Request) -> str:
    return principal_of(request.scope).name


async def _principal_of(request: Request) -> Principal:
    return principal_of(request.scope)


async def _require_role(request: Request) -> None:
    """On every route: all principals may read, operators may also write."""
    principal = principal_of(request.scope)
    if request.method not in READING:
        require_operator(principal)


async def _require_operator(request: Request) -> None:
    require_operator(principal_of(request.scope))


async def _require_known_query(request: Request) -> None:
    """Reject unknown parameters: with a mistyped filter, the response would contain everything."""
    if request.query_params:
        known = request.app.known_query(request.method.lower(), request.url.path)
        for name in request.query_params:
            if name not in known:
                valid = ", ".join(known) or "none"
                raise BadRequest(f"unknown query parameter {clip(name)}: valid are {valid}", field=name[:60])


async def _expected_revisions(
    if_match: Annotated[
        str, Header(alias="If-Match", max_length=1000, description='the ETag that was read, such as "3"; * for any')
    ],
) -> frozenset[int] | None:
    """The revisions in If-Match (RFC 9110, section 13.1.1); None for any."""
    if if_match.strip() == "*":
        return None
    revisions = set()
    weak = False
    for tag in if_match.split(","):
        match = _TAG.fullmatch(tag.strip())
        if match is None:
            raise BadRequest(
                f'If-Match {if_match[:60]!r} is not valid: send the ETag that was read, such as "3"', field="If-Match"
            )
        if match[1] is not None:
            weak = True
        elif match[2]:
            revisions.add(int(match[2]))
    if weak and not revisions:
        raise StaleRevision(
            f"If-Match {if_match[:60]!r} is a weak ETag, which never matches (RFC 9110, section 13.1.1): send it without the W/, "
            "which a compressing proxy may have added"
        )
    return frozenset(revisions)


OPERATORS_ONLY: Final = Depends(_require_operator)
"""The dependency of routes that viewers may not read either."""

Caller = Annotated[Principal, Depends(_principal_of)]
Actor = Annotated[str, Depends(_actor_of)]
Revisions = Annotated[frozenset[int] | None, Depends(_expected_revisions)]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="maximum number of items")]
After = Annotated[str | None, Query(max_length=2000, description="'next' of the previous page"), Plain]
Contains = Annotated[str | None, Query(max_length=200, description="filter: contains this text, case-insensitive"), Plain]
Exactly = Annotated[str | None, Query(max_length=400, description="filter: equals this text"), Plain]


KeyId = Annotated[str | None, Query(max_length=24, description="id of an API key"), Plain]
Ip = Annotated[str | None, Query(max_length=45, description="IPv4 or IPv6 address of a client"), Plain]
SubjectText = Annotated[
    str | None,
    Query(max_length=5000, description="subject of attributes, such as user=42, or org=acme&user=42 for both together"),
    Plain,
]


class AdminRouter(APIRouter):
    """Routes below `/admin/v1`, with the checks and the responses that all of them have.

    Each route is complete when it is added. `include_router` would make every route and all its validators a second time: half
    of what a start of the control plane takes.
    """

    def __init__(self, prefix: str = "", tags: Sequence[str] = (), dependencies: Sequence[Dependency] = ()) -> None:
        of_all = (Depends(BEARER), Depends(_require_role), Depends(_require_known_query))
        super().__init__(prefix=PREFIX + prefix, tags=[*tags], dependencies=[*of_all, *dependencies], responses=ERRORS)


def tagged(response: Response, resource: _Tagged) -> _Tagged:
    """Set the ETag to the revision of a resource; returns the resource."""
    response.headers["ETag"] = f'"{resource.revision}"'
    return resource
