"""The control plane as one app: every room behind the guard, one form for every error, one description of it all."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tidegate._version import __version__
from tidegate.admin.models import ProblemRead
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.tokens import TokenCheck
from tidegate.decision import clip
from tidegate.doors.admin.api_keys import key_routes
from tidegate.doors.admin.caller_tokens import caller_token_routes
from tidegate.doors.admin.common import BEARER, ERRORS, REF, WITH_ROLE, RevisionNotGiven
from tidegate.doors.admin.guard import Guard, error_headers
from tidegate.doors.admin.policy import policy_routes
from tidegate.doors.admin.records import record_routes
from tidegate.doors.admin.rules import rule_routes
from tidegate.doors.admin.tiers import tier_routes
from tidegate.doors.admin.tokens import token_routes
from tidegate.doors.client_address import TrustedProxies
from tidegate.doors.responses import error_body
from tidegate.errors import BadRequest, TidegateError
from tidegate.gate.gate import Gate

PREFIX: Final = "/admin/v1"

_CODES: Final = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}
_MAX_DETAILS: Final = 20


class AdminDeps(msgspec.Struct, frozen=True):
    """What the control plane stands on.

    Args:
        editor: of the catalog.
        gate: what counts; its catalog is what the data plane asks.
        settings_token: bearer token of the operator that the settings name; None where they name none.
        trusted: proxies whose word about the client's address is believed.
        rate: limit of requests for each token.
        failed_rate: limit of requests with a wrong token for each address.
        failed_rate_overall: the same from all addresses.
        body_timeout_s: how long a body may take, s.
    """

    editor: CatalogEditor
    gate: Gate
    settings_token: str | None = None
    trusted: TrustedProxies = TrustedProxies(())
    rate: str = "600/minute"
    failed_rate: str = "20/minute"
    failed_rate_overall: str = "200/minute"
    body_timeout_s: float = 10.0


def admin_app(deps: AdminDeps) -> FastAPI:
    """Make the control plane.

    Args:
        deps: what it stands on.

    Returns:
        An ASGI app.
    """
    app = _App(title="Tidegate control plane", version=__version__, openapi_url=None, docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False
    app.add_middleware(
        Guard,
        tokens=TokenCheck(deps.editor, deps.settings_token),
        trusted=deps.trusted,
        rate=deps.rate,
        failed_rate=deps.failed_rate,
        failed_rate_overall=deps.failed_rate_overall,
        body_timeout_s=deps.body_timeout_s,
    )
    routes = APIRouter(prefix=PREFIX, responses=ERRORS, dependencies=[Depends(BEARER), WITH_ROLE, Depends(_require_known_query)])
    for room in (
        tier_routes(deps.editor, deps.gate),
        rule_routes(deps.editor, deps.gate),
        key_routes(deps.editor, deps.gate),
        record_routes(deps.editor, deps.gate),
        policy_routes(deps.editor),
        token_routes(deps.editor),
        caller_token_routes(deps.editor),
    ):
        routes.include_router(room)
    app.include_router(routes)
    for path in ("/openapi.json", f"{PREFIX}/openapi.json"):
        app.add_api_route(path, _description, include_in_schema=False)
    app.add_exception_handler(TidegateError, _refused)
    app.add_exception_handler(RequestValidationError, _not_understood)
    app.add_exception_handler(HTTPException, _no_route)
    return app


class _App(FastAPI):
    """FastAPI with a description that tells what is really answered."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            described = super().openapi()
            for operation in (each for path in described["paths"].values() for each in path.values()):
                # What FastAPI would answer 422, this app answers 400 in its own form.
                operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                described["components"]["schemas"].pop(name, None)
            problem = ProblemRead.model_json_schema(ref_template=REF, mode="serialization")
            described["components"]["schemas"].update({**problem.pop("$defs", {}), ProblemRead.__name__: problem})
        return self.openapi_schema or described

    def known_query(self, method: str, path: str) -> list[str]:
        """Names of the query parameters that an operation reads.

        Args:
            method: in lower case.
            path: of the request.

        Returns:
            The names.
        """
        described = self.openapi()["paths"]
        found: dict[str, Any] = described.get(path) or next(
            (each for template, each in described.items() if re.fullmatch(re.sub(r"\{[^}]*\}", "[^/]+", template), path)), {}
        )
        return [each["name"] for each in found.get(method, {}).get("parameters", ()) if each["in"] == "query"]


async def _description(request: Request) -> JSONResponse:
    # Made at the first request, which takes some 0.3 s: in a thread, so that no check waits for it.
    return JSONResponse(await asyncio.to_thread(request.app.openapi))


def _require_known_query(request: Request) -> None:
    """A parameter that nobody reads is a mistake: a filter that was mistyped would show everything."""
    if request.query_params:
        known = request.app.known_query(request.method.lower(), request.url.path)
        for name in request.query_params:
            if name not in known:
                there = ", ".join(known) or "none"
                raise BadRequest(f"unknown query parameter {clip(name)}: there are {there}", field=name[:60])


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, TidegateError)
    return JSONResponse(error_body(error), error.status, error_headers(error))


async def _not_understood(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if any(each["loc"] == ("header", "If-Match") and each["type"] == "missing" for each in found):
        return await _refused(request, RevisionNotGiven("If-Match is missing: send the ETag that was read, or * for any"))
    complaints = [_complaint(each) for each in found[:_MAX_DETAILS]]
    if any(each["loc"] == ("body",) and isinstance(each.get("input"), bytes) for each in found):
        complaints = [("body", "must be JSON, sent with Content-Type: application/json")]
    field, reason = complaints[0]
    fields = [{"field": each, "reason": why} for each, why in complaints]
    return await _refused(request, BadRequest(f"{field} {reason}", fields=fields))


async def _no_route(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = {
        404: f"there is nothing at {clip(request.url.path)}: see {PREFIX}/openapi.json",
        405: f"{request.method[:20]} is not for {clip(request.url.path)}: see {PREFIX}/openapi.json",
    }.get(error.status_code, str(error.detail))
    body = {"error": {"code": _CODES.get(error.status_code, "BAD_REQUEST"), "message": message, "details": {}}}
    return JSONResponse(body, error.status_code, error.headers)


def _complaint(found: dict[str, Any]) -> tuple[str, str]:
    """The field and what is wrong with it; what was sent is not repeated, it may be long or secret."""
    place: Sequence[Any] = found["loc"]
    if found["type"] == "json_invalid":
        return "body", f"is not JSON: {found['ctx']['error']} at character {place[-1]}"
    # The first part says where it stood: body, query, path or header.
    field = ".".join(str(part) for part in place[1:]) or str(place[0])
    reason = str(found["msg"]).removeprefix("Value error, ")
    return clip(field)[1:-1], "is missing: add it" if found["type"] == "missing" else reason[:1].lower() + reason[1:]
