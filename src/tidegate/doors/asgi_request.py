"""Requests of ASGI frameworks, Starlette and FastAPI above all, as a limit sees them. No framework is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from tidegate.decision import Decision
from tidegate.doors.client_address import FORWARDING
from tidegate.doors.exceeded import RateLimitExceeded, litestar_error, loaded, starlette_error, use_json_answer
from tidegate.doors.outward import outward
from tidegate.doors.request_headers import AsgiHeaders, RequestHeaders
from tidegate.doors.request_view import DECISION, stricter
from tidegate.doors.responses import limit_headers, raw_limit_headers
from tidegate.errors import TidegateError


class AsgiRequest:
    """A request or WebSocket of Starlette or FastAPI, or any object with an ASGI `scope`."""

    __slots__ = ("_scope", "native")
    enabled = True

    def __init__(self, native: Any) -> None:
        self.native = native
        self._scope: MutableMapping[str, Any] = native.scope

    @property
    def method(self) -> str:
        """See `RequestView`."""
        return str(self._scope.get("method", "WEBSOCKET"))

    def peer(self) -> str:
        """See `RequestView`."""
        client = self._scope.get("client")
        return client[0] if client else ""

    def header(self, name: str) -> str | None:
        """See `RequestView`."""
        wanted = name.encode("latin-1")
        for each, value in self._scope["headers"]:
            if each.lower() == wanted:
                return str(value, "latin-1")
        return None

    def forwarding(self) -> RequestHeaders:
        """See `RequestView`."""
        return AsgiHeaders(self._scope["headers"], FORWARDING)

    def attribute(self, name: str) -> object:
        """See `RequestView`."""
        state = self._scope.get("state")
        found = state.get(name) if isinstance(state, Mapping) else getattr(state, name, None)
        return found if found is not None else self._scope.get("path_params", {}).get(name)

    def keep(self, decision: Decision) -> Decision:
        """See `RequestView`."""
        known = self._scope.get(DECISION)
        kept = self._scope[DECISION] = decision if known is None else stricter(known, decision)
        return kept

    def add_headers(self, result: Any, decision: Decision) -> None:
        """See `RequestView`."""
        if hasattr(result, "raw_headers"):  # a response of Starlette
            put_starlette_headers(result, self._scope.get(DECISION, decision))

    def on_close(self, result: Any, close: Callable[[], None], function: Callable[..., Any] | None) -> bool:  # noqa: ARG002
        """See `RequestView`: a decorated endpoint ends when it returns."""
        return False

    def denied(self, decision: Decision, message: str | None, scope: str) -> RateLimitExceeded:
        """See `RequestView`."""
        if "litestar_app" in self._scope:
            return litestar_error(decision, message, scope)
        if loaded("starlette") is None:
            return RateLimitExceeded(decision, message, scope)
        use_json_answer(self._scope)
        return starlette_error(decision, message, scope)

    def answer(self, error: TidegateError) -> None:
        """See `RequestView`."""

    def failure(self, error: TidegateError) -> Exception:
        """See `RequestView`."""
        message, _ = outward(error)
        made: Exception
        if "litestar_app" in self._scope:
            from litestar.exceptions import HTTPException

            made = HTTPException(detail=message, status_code=error.status, headers={"x-tidegate-error": error.code})
            return made
        exceptions = loaded("starlette.exceptions")
        if exceptions is None:
            return error
        made = exceptions.HTTPException(error.status, message, {"x-tidegate-error": error.code})
        return made


def put_starlette_headers(response: Any, decision: Decision) -> None:
    """Put the limit headers of a decision on a response of Starlette, in place of those of another limit."""
    raw = response.raw_headers
    for name, _ in raw:
        if name == b"ratelimit":
            response.headers.update(dict(limit_headers(decision)))
            return
    # Setting them one by one costs three times as much.
    raw.extend(raw_limit_headers(decision))
