"""The middleware of the control plane: authentication, limits of requests, limits of bodies."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

from tidegate.admin.tokens import OPERATOR, Principal, TokenCheck
from tidegate.decision import Decision
from tidegate.doors.admin.session_cookies import POLL_HEADER, SESSION_PATH, SessionCookies
from tidegate.doors.client_address import FORWARDING, TrustedProxies, counted_client
from tidegate.doors.limiter import Limiter
from tidegate.doors.refusals import IDENTITY, BodyTooSlow, unsupported_encoding
from tidegate.doors.request_headers import AsgiHeaders, single
from tidegate.doors.responses import ceil_s, encode, error_body
from tidegate.errors import BadRequest, RequestTooLarge, TidegateError, clip
from tidegate.telemetry.logs import UNAUTHENTICATED
from tidegate.telemetry.requests import CURRENT, REQUEST_ID, Request

logger = logging.getLogger(__name__)

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

GUARDED: Final = "/admin/v1/"
OPEN: Final = frozenset({"/admin/v1/openapi.json", "/openapi.json"})
MAX_BODY_BYTES: Final = 1_000_000
LARGE_BODIES: Final = {"/admin/v1/what-if": 20_000_000}
"""Paths of larger bodies, for operators; with the access log of what-if."""
LIVE_PATH: Final = "/admin/v1/live"
INTERNAL: Final = "tidegate.internal"
"""Set in the scope of requests that a stream of `LIVE_PATH` makes; a client cannot set it. Its request was authenticated."""
READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
SECURITY_HEADERS: Final = (
    (
        b"content-security-policy",
        b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    ),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)
"""Sent with every response: no page of another site shows this one in a frame, and no script of elsewhere runs in it."""
_ALL: Final = "all"
_DECIDING: Final = FORWARDING | {b"authorization"}
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class MissingToken(TidegateError):
    """The request has no bearer token."""

    code = "MISSING_TOKEN"
    status = 401


class InvalidToken(TidegateError):
    """The bearer token is unknown, expired or revoked."""

    code = "INVALID_TOKEN"
    status = 401


class InsufficientRole(TidegateError):
    """The token's role has no permission for the request."""

    code = "FORBIDDEN"
    status = 403


class TooManyRequests(TidegateError):
    """The control plane's own limit is exceeded."""

    code = "RATE_LIMIT_EXCEEDED"
    status = 429


class InternalError(TidegateError):
    """An unhandled exception."""

    code = "INTERNAL"
    status = 500


class Guard:
    """ASGI middleware.

    Args:
        trusted: proxies whose headers with the client's address are trusted; separate from those of the data plane.
        rate: limit of requests per token.
        failed_rate: limit of requests with a wrong token per address. Requests with a valid token are accepted beyond it.
        failed_rate_overall: limit of requests with a wrong token from all addresses.
        body_timeout_s: time limit of receiving a body, s.
        cookies: sessions of the console; None without a console.
    """

    def __init__(
        self,
        app: App,
        tokens: TokenCheck,
        trusted: TrustedProxies,
        rate: str = "600/minute",
        failed_rate: str = "20/minute",
        failed_rate_overall: str = "200/minute",
        body_timeout_s: float = 10.0,
        cookies: SessionCookies | None = None,
    ) -> None:
        self._app = app
        self._cookies = cookies
        self._tokens = tokens
        self._trusted = trusted
        self._requests = Limiter(rate, name="admin requests")
        self._failures = Limiter(failed_rate, name="admin failures")
        self._all_failures = Limiter(failed_rate_overall, name="all admin failures")
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            return
        if INTERNAL in scope:
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        request = Request(headers, peer=_peer(scope), trusts=self._trusted.trusts)
        CURRENT.set(request)
        status, started_ns = 0, time.perf_counter_ns()

        async def send_on(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (REQUEST_ID.encode(), request.id.encode()),
                    *SECURITY_HEADERS,
                ]
            await send(message)

        try:
            _reject_control_characters(scope["path"])
            signs_in = self._cookies is not None and scope["path"] == SESSION_PATH and scope["method"] == "POST"
            state = scope.setdefault("state", {})
            if scope["path"].startswith(GUARDED) and scope["path"] not in OPEN and not signs_in:
                await self._authenticate(scope, state)
            body = await self._body(headers, receive, LARGE_BODIES.get(scope["path"], MAX_BODY_BYTES))
            if signs_in and self._cookies is not None and body is not None:
                state["token"] = self._cookies.sign_in(scope, body, _peer(scope))
                state["principal"] = await self._principal_of_token(scope, state["token"])
            if body is not None:
                await self._app(scope, _replay(body, receive), send_on)
        except TidegateError as error:
            await answer_error(send_on, error)
        except Exception:
            # The outermost handler: without it, an unhandled exception would close the connection without a response.
            logger.exception("the control plane failed at %s %s", scope["method"], scope["path"][:200])
            if not status:
                await answer_error(
                    send_on, InternalError(f"internal error of the control plane: see its log for request {request.id}")
                )
        finally:
            if scope["method"] not in READING or status >= 500:
                _log(scope, status, time.perf_counter_ns() - started_ns)
            request.over = True

    async def _authenticate(self, scope: Scope, state: MutableMapping[str, Any]) -> None:
        """Set the principal; for who asks whether there is a session, none is an answer too."""
        try:
            state["principal"] = await self._principal(scope)
        except (MissingToken, InvalidToken):
            if scope["path"] != SESSION_PATH or scope["method"] not in READING:
                raise

    async def _principal(self, scope: Scope) -> Principal:
        headers = AsgiHeaders(scope["headers"], _DECIDING)
        authorization = single(headers, "authorization")
        if self._cookies is not None and authorization is None:
            secret = self._cookies.secret(scope)
            if secret is not None:
                return await self._principal_of_session(scope, self._cookies, secret)
        scheme, _, token = (authorization or "").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise MissingToken("the token is missing: send 'Authorization: Bearer …'")
        principal = await self._principal_of_token(scope, token)
        return _permitted(scope, principal)

    async def _principal_of_token(self, scope: Scope, token: str) -> Principal:
        client = self._client(scope)
        known = True
        if not await self._has_attempts_left(client):
            # Wrong tokens of others never block a valid token, but many wrong ones must not cost a query each.
            known = await self._tokens.is_known(token)
        principal = await self._tokens.principal(token) if known else None
        if principal is None:
            await self._count_failure(client)
            raise InvalidToken("the token is unknown, expired or revoked: ask an operator for a new one")
        self._require_allowed(await self._requests.check(principal.subject), "requests with this token")
        return principal

    async def _principal_of_session(self, scope: Scope, cookies: SessionCookies, secret: str) -> Principal:
        client = self._client(scope)
        sessions = cookies.sessions
        known = await self._has_attempts_left(client) or await sessions.is_known(secret)
        used = scope["path"] != LIVE_PATH and all(name.lower() != POLL_HEADER for name, _ in scope["headers"])
        reading = scope["method"] in READING
        principal = await sessions.principal(secret, used=used, reading=reading) if known else None
        if principal is None:
            await self._count_failure(client)
            raise InvalidToken("the session is over: sign in again")
        self._require_allowed(await self._requests.check(principal.subject), "requests with this token")
        if scope["method"] not in READING:
            cookies.require_csrf_token(scope, secret)
        scope["state"]["session"] = secret
        return _permitted(scope, principal)

    def _client(self, scope: Scope) -> str:
        """What counts as the client whose wrong tokens are counted."""
        peer = _peer(scope)
        return counted_client(self._trusted.client(peer, AsgiHeaders(scope["headers"], _DECIDING)), peer)

    async def _count_failure(self, client: str) -> None:
        self._require_allowed(await self._failures.check(client), "requests with a wrong token from this address")
        self._require_allowed(await self._all_failures.check(_ALL), "requests with a wrong token from all addresses")

    async def _has_attempts_left(self, client: str) -> bool:
        peeked = await self._failures.check(client, 0), await self._all_failures.check(_ALL, 0)
        return all(each.remaining != 0 for each in peeked)

    def _require_allowed(self, decision: Decision, what: str) -> None:
        if not decision.allowed:
            after_s = ceil_s(decision.retry_after_us or 0)
            raise TooManyRequests(f"more than {decision.binding} {what}: try again in {after_s} s", retry_after_s=after_s)

    async def _body(self, headers: dict[str, str], receive: Receive, max_bytes: int = MAX_BODY_BYTES) -> bytes | None:
        """The complete body; None if the client disconnected."""
        encoding = headers.get("content-encoding", "")
        if encoding.strip().lower() not in IDENTITY:
            raise unsupported_encoding(encoding)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > max_bytes:
            raise _too_large(max_bytes)
        body = bytearray()
        try:
            async with asyncio.timeout(self._body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > max_bytes:
                        raise _too_large(max_bytes)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise BodyTooSlow(f"the body was not received within {self._body_timeout_s:g} s: send it without pauses") from None


def _permitted(scope: Scope, principal: Principal) -> Principal:
    """The principal, if its role permits the method. Every role may end its own session."""
    if scope["method"] not in READING and scope["path"] != SESSION_PATH:
        require_operator(principal)
    return principal


def require_operator(principal: Principal) -> None:
    """Require the role operator.

    Raises:
        InsufficientRole: if the principal is a viewer.
    """
    if principal.role != OPERATOR:
        raise InsufficientRole(
            f"the token {principal.name[:60]!r} has the role viewer, which may not do this: use a token of an operator"
        )


def principal_of(scope: Scope) -> Principal:
    """The principal that the guard has authenticated.

    Raises:
        MissingToken: if the request did not pass the guard.
    """
    principal = scope.get("state", {}).get("principal")
    if not isinstance(principal, Principal):
        raise MissingToken("the token is missing: send 'Authorization: Bearer …'")
    return principal


def error_headers(error: TidegateError) -> dict[str, str]:
    """Additional headers of an error response, names in lower case."""
    if error.status == 401:
        return {"www-authenticate": "Bearer"}
    if isinstance(error, TooManyRequests):
        return {"retry-after": str(error.details["retry_after_s"])}
    return {"retry-after": "1"} if error.status == 503 else {}


async def answer_error(send: Send, error: TidegateError) -> None:
    """Send an error response in the usual format."""
    body = encode(error_body(error))
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error_headers(error)}
    start = {"type": "http.response.start", "status": error.status}
    await send({**start, "headers": [(name.encode(), value.encode()) for name, value in headers.items()]})
    await send({"type": "http.response.body", "body": body})


def _log(scope: Scope, status: int, duration_ns: int) -> None:
    """Log a writing request, also a rejected one; the audit log contains what it changed."""
    principal = scope.get("state", {}).get("principal")
    fields = {
        "event.dataset": "tidegate.admin",
        "event.duration": duration_ns,
        "http.request.method": scope["method"],
        "http.response.status_code": status,
        "url.path": scope["path"][:500],
        "user.name": principal.name if isinstance(principal, Principal) else None,
    }
    fields = {name: each for name, each in fields.items() if each is not None}
    # The log rate of requests without a valid token is limited: anybody can send them.
    extra = {"ecs": fields, UNAUTHENTICATED: not isinstance(principal, Principal)}
    logger.info("%s %s answered %d", scope["method"], scope["path"][:200], status, extra=extra)


def _reject_control_characters(path: str) -> None:
    """Reject control characters, which may end the match of a route's pattern; no valid path has any."""
    if _CONTROL.search(path):
        raise BadRequest(f"the path {clip(path)} contains a control character: remove it", field="path")


def _peer(scope: Scope) -> str:
    """The address of the connected peer; empty if there is none."""
    return scope["client"][0] if scope.get("client") else ""


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body has more than {max_bytes} bytes: send less per request")
