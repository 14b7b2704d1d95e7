"""The control plane as one app: all routes behind the guard, with one format of errors and one OpenAPI description."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tidegate._version import __version__
from tidegate.admin.models import ProblemRead
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.sessions import Sessions
from tidegate.admin.tokens import TokenCheck
from tidegate.admin.what_if import WhatIfRuns
from tidegate.doors.admin.api_keys import key_routes
from tidegate.doors.admin.blocks import block_routes
from tidegate.doors.admin.caller_tokens import caller_token_routes
from tidegate.doors.admin.common import PREFIX, REF, AdminRouter, RevisionMissing
from tidegate.doors.admin.customers import customer_routes
from tidegate.doors.admin.explain import explain_routes
from tidegate.doors.admin.guard import Guard, error_headers
from tidegate.doors.admin.live import live_routes
from tidegate.doors.admin.namespaces import caller_routes, namespace_routes
from tidegate.doors.admin.notifications import notification_routes
from tidegate.doors.admin.policy import policy_routes
from tidegate.doors.admin.records import record_routes
from tidegate.doors.admin.rules import rule_routes
from tidegate.doors.admin.session_cookies import SessionCookies
from tidegate.doors.admin.sessions import session_routes
from tidegate.doors.admin.subject_overrides import override_routes
from tidegate.doors.admin.system import system_routes
from tidegate.doors.admin.tiers import tier_routes
from tidegate.doors.admin.tokens import token_routes
from tidegate.doors.admin.traffic import traffic_routes
from tidegate.doors.admin.usage import usage_routes
from tidegate.doors.admin.usage_export import usage_export_routes
from tidegate.doors.admin.what_if import what_if_routes
from tidegate.doors.client_address import TrustedProxies
from tidegate.doors.console import console_routes
from tidegate.doors.responses import error_body
from tidegate.errors import BadRequest, TidegateError, clip
from tidegate.gate.gate import Gate
from tidegate.policy.paths import STRICT, PathRules

_CODES: Final = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}
_MAX_DETAILS: Final = 20


class ConsoleOptions(msgspec.Struct, frozen=True):
    """Options of the console.

    Args:
        idle_s: how long a session lasts without use, s.
        secure: whether browsers use TLS.
        demo_token: token with which a browser on this machine is signed in without one; None for none.
    """

    idle_s: float = 1800.0
    secure: bool = False
    demo_token: str | None = None


class AdminDeps(msgspec.Struct, frozen=True):
    """The dependencies and settings of the control plane.

    Args:
        settings_token: the operator's bearer token in the settings; None if there is none.
        trusted: proxies whose headers with the client's address are trusted.
        rate: limit of requests per token.
        failed_rate: limit of requests with a wrong token per address.
        failed_rate_overall: limit of requests with a wrong token from all addresses.
        body_timeout_s: time limit of receiving a body, s.
        paths: which encodings of a path are accepted.
        console: options of the console; None without it.
        system: returns the state of this process; None where there is no server.
        what_if: runs of what-if, to be closed by the caller; None for ones that end with the process.
    """

    editor: CatalogEditor
    gate: Gate
    settings_token: str | None = None
    trusted: TrustedProxies = TrustedProxies(())
    rate: str = "600/minute"
    failed_rate: str = "20/minute"
    failed_rate_overall: str = "200/minute"
    body_timeout_s: float = 10.0
    paths: PathRules = STRICT
    console: ConsoleOptions | None = None
    system: Callable[[], Awaitable[dict[str, Any]]] | None = None
    what_if: WhatIfRuns | None = None


def admin_app(deps: AdminDeps) -> FastAPI:
    """Create the control plane's ASGI app."""
    app = _App(title="Tidegate control plane", version=__version__, openapi_url=None, docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False
    tokens, sessions, cookies = add_guard(app, deps)
    routers: list[AdminRouter] = [
        tier_routes(deps.editor, deps.gate),
        override_routes(deps.editor),
        rule_routes(deps.editor, deps.gate),
        key_routes(deps.editor, deps.gate),
        customer_routes(deps.editor),
        usage_routes(deps.editor, deps.gate),
        explain_routes(deps.editor, deps.gate, deps.paths),
        record_routes(deps.editor),
        traffic_routes(deps.editor),
        usage_export_routes(deps.editor),
        policy_routes(deps.editor),
        token_routes(deps.editor),
        caller_token_routes(deps.editor),
        namespace_routes(deps.editor),
        caller_routes(deps.editor),
        system_routes(deps.system),
        live_routes(tokens, sessions),
        what_if_routes(deps.what_if or WhatIfRuns(deps.editor)),
        block_routes(deps.editor),
        notification_routes(deps.editor),
    ]
    for router in routers:
        app.router.routes.extend(router.routes)
    if cookies is not None:
        app.router.routes.extend(session_routes(cookies).routes)
        app.router.routes.extend(console_routes().routes)
    for path in ("/openapi.json", f"{PREFIX}/openapi.json"):
        app.add_api_route(path, _description, include_in_schema=False)
    app.add_exception_handler(TidegateError, _error_response)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    return app


def add_guard(app: FastAPI, deps: AdminDeps) -> tuple[TokenCheck, Sessions | None, SessionCookies | None]:
    """Put the middleware before the routes of an app.

    Returns:
        What checks tokens; the console's sessions and their cookies, None without it.
    """
    tokens = TokenCheck(deps.editor, deps.settings_token)
    sessions = cookies = None
    if deps.console is not None:
        options = deps.console
        sessions = Sessions(deps.editor, tokens, options.idle_s)
        cookies = SessionCookies(sessions, options.idle_s, secure=options.secure, demo_token=options.demo_token)
    app.add_middleware(
        Guard,
        tokens=tokens,
        trusted=deps.trusted,
        rate=deps.rate,
        failed_rate=deps.failed_rate,
        failed_rate_overall=deps.failed_rate_overall,
        body_timeout_s=deps.body_timeout_s,
        cookies=cookies,
    )
    return tokens, sessions, cookies


class _App(FastAPI):
    """FastAPI with an OpenAPI description that matches this app's error responses."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            described = super().openapi()
            for operation in (each for path in described["paths"].values() for each in path.values()):
                # Where FastAPI would answer 422, this app answers 400 in its own format.
                operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                described["components"]["schemas"].pop(name, None)
            problem = ProblemRead.model_json_schema(ref_template=REF, mode="serialization")
            described["components"]["schemas"].update({**problem.pop("$defs", {}), ProblemRead.__name__: problem})
        return self.openapi_schema or described

    def known_query(self, method: str, path: str) -> list[str]:
        """The names of an operation's query parameters; `method` in lower case."""
        described = self.openapi()["paths"]
        operations: dict[str, Any] = described.get(path) or next(
            (each for template, each in described.items() if re.fullmatch(re.sub(r"\{[^}]*\}", "[^/]+", template), path)), {}
        )
        return [each["name"] for each in operations.get(method, {}).get("parameters", ()) if each["in"] == "query"]


async def _description(request: Request) -> JSONResponse:
    # Generated at the first request, which takes about 0.3 s: in a thread, so that no check waits for it.
    return JSONResponse(await asyncio.to_thread(request.app.openapi))


async def _error_response(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, TidegateError)
    return JSONResponse(error_body(error), error.status, error_headers(error))


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    if any(each["loc"] == ("header", "If-Match") and each["type"] == "missing" for each in errors):
        return await _error_response(request, RevisionMissing("If-Match is missing: send the ETag that was read, or * for any"))
    problems = [_problem(each) for each in errors[:_MAX_DETAILS]]
    if any(each["loc"] == ("body",) and isinstance(each.get("input"), bytes) for each in errors):
        problems = [("body", "must be JSON, sent with Content-Type: application/json")]
    field, reason = problems[0]
    fields = [{"field": each, "reason": why} for each, why in problems]
    return await _error_response(request, BadRequest(f"{field} {reason}", fields=fields))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = {
        404: f"there is nothing at {clip(request.url.path)}: see {PREFIX}/openapi.json",
        405: f"{request.method[:20]} is not for {clip(request.url.path)}: see {PREFIX}/openapi.json",
    }.get(error.status_code, str(error.detail))
    body = {"error": {"code": _CODES.get(error.status_code, "BAD_REQUEST"), "message": message, "details": {}}}
    return JSONResponse(body, error.status_code, error.headers)


def _problem(error: dict[str, Any]) -> tuple[str, str]:
    """The field, and what is wrong with it; without the value, which may be long or secret."""
    location: Sequence[Any] = error["loc"]
    if error["type"] == "json_invalid":
        return "body", f"is not JSON: {error['ctx']['error']} at character {location[-1]}"
    # The first part is body, query, path or header.
    field = ".".join(str(part) for part in location[1:]) or str(location[0])
    reason = str(error["msg"]).removeprefix("Value error, ")
    return clip(field)[1:-1], "is missing: add it" if error["type"] == "missing" else reason[:1].lower() + reason[1:]
