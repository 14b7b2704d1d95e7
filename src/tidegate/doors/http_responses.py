"""Responses of the data plane that depend on the request: `/v1/authorize`, and errors in the form that the client can read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final, NamedTuple

import msgspec

from tidegate.decision import Decision
from tidegate.doors.http_requests import AUTHORIZE, Scope, is_envoy
from tidegate.doors.key_sources import KeySources
from tidegate.doors.refusals import BodyTooSlow, MethodNotAllowed, UnsupportedEncoding
from tidegate.doors.responses import (
    NO_STORE,
    Headers,
    caller_headers,
    denial_cache_headers,
    edge_cache_headers,
    encode,
    error_body,
    limit_headers,
    overage_headers,
    retry_headers,
)
from tidegate.errors import RequestTooLarge, TidegateError
from tidegate.policy.attributes import CallerPolicy
from tidegate.telemetry.requests import REQUEST_ID, Request

DENIED_STATUS: Final = "x-tidegate-denied-status"
"""The request header with which a gateway requests 403 instead of every refusal except 401."""
JSON: Final = ("content-type", "application/json")


class Response(msgspec.Struct, frozen=True):
    """An answer that no check is behind: health, metrics, OpenAPI.

    Args:
        status: HTTP status.
        content_type: of the body.
        body: the bytes.
    """

    status: int
    content_type: str
    body: bytes


class Prepared(NamedTuple):
    """A response to send.

    Args:
        status: HTTP status.
        headers: all but those of the connection.
        body: None for a response without one.
    """

    status: int
    headers: Headers
    body: bytes | None = None


def authorize_response(
    scope: Scope, decision: Decision, for_envoy: bool, policy: CallerPolicy | None, keys: KeySources
) -> Prepared:
    """The response of `/v1/authorize`.

    Args:
        for_envoy: whether it was sent to `AUTHORIZE_ENVOY`.
        policy: the active one, whose attributes the response depends on; None if it was replaced just now.
        keys: where the API key was read.

    Returns:
        The response.
    """
    headers = limit_headers(decision)
    if decision.allowed:
        headers += [*overage_headers(decision), *caller_headers(decision), NO_STORE]
        return Prepared(200 if for_envoy else 204, headers)
    # What it depends on is not known while the policy is being replaced.
    headers += [NO_STORE] if policy is None else denial_cache_headers(decision, policy.request_headers + keys.more_headers)
    if scope.headers.get(DENIED_STATUS) == "403":
        headers += edge_cache_headers(decision)
        return Prepared(403, [*headers, ("x-tidegate-error", "RATE_LIMIT_EXCEEDED"), ("x-tidegate-status", "429")])
    return Prepared(429, headers)


def error_response(scope: Scope, error: TidegateError, request: Request | None) -> Prepared:
    """The response for an error.

    Args:
        error: why there is no decision.
        request: the same request, for its id; None where it has none.

    Returns:
        The response.
    """
    if scope.path == AUTHORIZE or is_envoy(scope.path):
        headers: Headers = [("x-tidegate-error", error.code), NO_STORE, *retry_headers(error)]
        if error.status in (401, 403):
            return Prepared(error.status, headers)
        if scope.headers.get(DENIED_STATUS) == "403":
            return Prepared(403, [*headers, ("x-tidegate-status", str(error.status))])
        if error.status == 429:
            return Prepared(429, headers)
    headers = [JSON, ("x-tidegate-error", error.code), *retry_headers(error)]
    if request is not None:
        headers.append((REQUEST_ID, request.id))
    if isinstance(error, MethodNotAllowed):
        headers.append(("allow", ", ".join(error.details["allow"])))  # type: ignore[arg-type]
    if isinstance(error, UnsupportedEncoding):
        headers.append(("accept-encoding", "identity"))
    if isinstance(error, RequestTooLarge | BodyTooSlow):
        headers.append(("connection", "close"))
    return Prepared(error.status, headers, encode(error_body(error)))


class StatusRecorder:
    """The responding side of a request, with the status that was sent.

    Args:
        proto: sends the response.

    Attributes:
        status: 0 before a response.
    """

    def __init__(self, proto: Any) -> None:
        self._proto = proto
        self.status = 0

    @property
    def complete(self) -> bool:
        """Whether the whole request has arrived."""
        return self._proto.complete  # type: ignore[no-any-return]

    def __call__(self) -> Any:
        """The whole body, when awaited."""
        return self._proto()

    def __aiter__(self) -> AsyncIterator[bytes]:
        """The body, piece by piece."""
        return self._proto.__aiter__()  # type: ignore[no-any-return]

    def response_bytes(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a response with a body."""
        self.status = status
        self._proto.response_bytes(status, headers, body)

    def response_empty(self, status: int, headers: Headers) -> None:
        """Send a response without a body."""
        self.status = status
        self._proto.response_empty(status, headers)
