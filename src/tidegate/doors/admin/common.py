"""What every room of the control plane needs: who asks, which revision was seen, which page is wanted."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, TypeVar

from fastapi import Depends, Header, Query, Request, Response
from fastapi.security import HTTPBearer

from tidegate.admin.models import KeyMade, KeyRead, KeyRotated, Plain, ProblemRead, RuleRead, TierRead
from tidegate.admin.tokens import Principal
from tidegate.admin.transaction import StaleRevision
from tidegate.catalog.sql.paging import MAX_PAGE
from tidegate.doors.admin.guard import READING, principal_of, require_operator
from tidegate.errors import BadRequest, TidegateError

_Tagged = TypeVar("_Tagged", TierRead, RuleRead, KeyRead, KeyMade, KeyRotated)

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
    400: _problem("What was sent makes no sense; the message says what and why."),
    401: _problem("No token came, or it is unknown, expired or revoked."),
    403: _problem("A viewer's token may only read."),
    404: _problem("What is asked for is not there."),
    408: _problem("The body did not come in time."),
    409: _problem("The catalog's state forbids it; the message says what to do first."),
    413: _problem("The body has more than 1 MB."),
    415: _problem("The body has a Content-Encoding."),
    429: _problem("Too many requests, or wrong tokens; Retry-After says when to try again."),
    503: _problem("The catalog or the counter store does not answer."),
}
EDIT_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    412: _problem("It was changed since it was read: read it again."),
    428: _problem("If-Match is missing: send the ETag that was read."),
}

# Only for the description: the guard has looked at the token before.
BEARER: Final = HTTPBearer(auto_error=False, description="TIDEGATE_ADMIN__TOKEN, or a token of /admin/v1/tokens")


class RevisionNotGiven(TidegateError):
    """A change that does not say which revision it saw."""

    code = "IF_MATCH_MISSING"
    status = 428


def _actor_of(request: Request) -> str:
    return principal_of(request.scope).name


def _principal_of(request: Request) -> Principal:
    return principal_of(request.scope)


def _require_role(request: Request) -> None:
    """On every route: whoever passed the guard reads, operators do everything."""
    principal = principal_of(request.scope)
    if request.method not in READING:
        require_operator(principal)


def _require_operator(request: Request) -> None:
    require_operator(principal_of(request.scope))


def _expected_revisions(
    if_match: Annotated[
        str, Header(alias="If-Match", max_length=1000, description='the ETag that was read, such as "3"; * for any')
    ],
) -> frozenset[int] | None:
    """The revisions that If-Match names (RFC 9110, section 13.1.1); None for any."""
    if if_match.strip() == "*":
        return None
    revisions = set()
    weak = False
    for tag in if_match.split(","):
        match = _TAG.fullmatch(tag.strip())
        if match is None:
            raise BadRequest(
                f'If-Match {if_match[:60]!r} is no ETag of ours: send it as it was read, such as "3"', field="If-Match"
            )
        if match[1] is not None:
            weak = True
        elif match[2]:
            revisions.add(int(match[2]))
    if weak and not revisions:
        raise StaleRevision(
            f"If-Match {if_match[:60]!r} is a weak ETag, which never matches (RFC 9110, section 13.1.1): send it without the W/, "
            "which a proxy that compresses answers may have added"
        )
    return frozenset(revisions)


WITH_ROLE: Final = Depends(_require_role)
"""The dependency of all routes."""
OPERATORS_ONLY: Final = Depends(_require_operator)
"""The dependency of routes that viewers may not even read."""

Caller = Annotated[Principal, Depends(_principal_of)]
Actor = Annotated[str, Depends(_actor_of)]
Revisions = Annotated[frozenset[int] | None, Depends(_expected_revisions)]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="at most so many items")]
After = Annotated[str | None, Query(max_length=2000, description="'next' of the page before"), Plain]
Contains = Annotated[str | None, Query(max_length=200, description="only those with this in it, in any case"), Plain]
Exactly = Annotated[str | None, Query(max_length=400, description="only this one"), Plain]


def tagged(response: Response, resource: _Tagged) -> _Tagged:
    """Send the revision of a resource as its ETag; returns the resource."""
    response.headers["ETag"] = f'"{resource.revision}"'
    return resource
