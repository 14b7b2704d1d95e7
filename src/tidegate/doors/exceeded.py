"""`RateLimitExceeded`: what a limited function raises, in the form that the framework around it answers with 429."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from tidegate.decision import Decision
from tidegate.doors.responses import encode, exceeded_body, limit_headers
from tidegate.errors import TidegateError


class RateLimitExceeded(TidegateError):
    """A call was denied by its limit; the function did not run.

    Under Starlette and FastAPI it is also an `HTTPException`, under Flask a `TooManyRequests` (whose `code` is 429): without a
    handler of yours both answer 429 as JSON with the limit headers.

    Args:
        decision: the denial.
        message: in place of the usual text.
        scope: name of the limit.

    Attributes:
        decision: the denial: `retry_after`, `limit`, `remaining`, `reset_after`.
        scope: name of the limit that denied.
    """

    code = "RATE_LIMIT_EXCEEDED"
    status = 429

    def __init__(self, decision: Decision, message: str | None = None, scope: str = "") -> None:
        error = exceeded_body(decision)["error"]
        super().__init__(message or error["message"], **error["details"])
        self.decision = decision
        self.scope = scope

    @property
    def retry_after(self) -> float | None:
        """Seconds until the same cost passes without other calls; None when it never will."""
        return self.decision.retry_after

    @property
    def limit_headers(self) -> dict[str, str]:
        """The limit headers and `Retry-After`, for an HTTP response."""
        return dict(limit_headers(self.decision))

    def body(self) -> bytes:
        """The JSON error form, as every HTTP door of Tidegate gives it."""
        return encode({"error": {"code": RateLimitExceeded.code, "message": self.message, "details": self.details}})


def starlette_error(decision: Decision, message: str | None, scope: str) -> RateLimitExceeded:
    """The exception for Starlette and FastAPI."""
    made: RateLimitExceeded = _starlette_class()(decision, message, scope)
    return made


def litestar_error(decision: Decision, message: str | None, scope: str) -> RateLimitExceeded:
    """The exception for Litestar."""
    made: RateLimitExceeded = _litestar_class()(decision, message, scope)
    return made


def flask_error(decision: Decision, message: str | None, scope: str) -> RateLimitExceeded:
    """The exception for Flask."""
    made: RateLimitExceeded = _flask_class()(decision, message, scope)
    return made


@cache
def _starlette_class() -> Any:
    from starlette.exceptions import HTTPException

    class StarletteRateLimitExceeded(RateLimitExceeded, HTTPException):
        def __init__(self, decision: Decision, message: str | None = None, scope: str = "") -> None:
            RateLimitExceeded.__init__(self, decision, message, scope)
            self.status_code = 429
            self.detail = self.message
            self.headers: Mapping[str, str] | None = self.limit_headers

        def __str__(self) -> str:
            return self.message

    StarletteRateLimitExceeded.__name__ = StarletteRateLimitExceeded.__qualname__ = "RateLimitExceeded"
    return StarletteRateLimitExceeded


@cache
def _litestar_class() -> Any:
    from litestar.exceptions import HTTPException

    class LitestarRateLimitExceeded(RateLimitExceeded, HTTPException):
        def __init__(self, decision: Decision, message: str | None = None, scope: str = "") -> None:
            RateLimitExceeded.__init__(self, decision, message, scope)
            self.status_code = 429
            self.detail = self.message
            self.headers = self.limit_headers
            self.extra = None

        def __str__(self) -> str:
            return self.message

    LitestarRateLimitExceeded.__name__ = LitestarRateLimitExceeded.__qualname__ = "RateLimitExceeded"
    return LitestarRateLimitExceeded


def use_json_answer(scope: Any) -> None:
    """Have Starlette answer a `RateLimitExceeded` of this request in the error form, unless the app has a handler for it.

    Without it Starlette's handler of `HTTPException` answers: as JSON in FastAPI, as plain text elsewhere.
    """
    handlers = scope.get("starlette.exception_handlers")
    if isinstance(handlers, tuple) and handlers and isinstance(handlers[0], dict):
        handlers[0].setdefault(RateLimitExceeded, answer_starlette)


async def answer_starlette(connection: Any, error: Any) -> Any:
    """Starlette's handler: 429 for a request; a WebSocket that is not accepted yet is refused with it, others are closed.

    Args:
        connection: a Request or WebSocket.
        error: a `RateLimitExceeded`.

    Returns:
        The response; None for a WebSocket.
    """
    from starlette.responses import Response
    from starlette.websockets import WebSocketState

    response = Response(error.body(), 429, error.limit_headers, "application/json")
    if connection.scope["type"] == "http":
        return response
    if connection.application_state is WebSocketState.CONNECTING and "websocket.http.response" in connection.scope.get(
        "extensions", {}
    ):
        await connection.send_denial_response(response)
    else:
        await connection.close(1008, reason=error.message[:120])
    return None


@cache
def _flask_class() -> Any:
    from werkzeug.exceptions import TooManyRequests
    from werkzeug.wrappers import Response

    class FlaskRateLimitExceeded(RateLimitExceeded, TooManyRequests):  # type: ignore[misc]  # two meanings of `code`
        code = 429  # type: ignore[assignment, misc]  # Flask finds error handlers by it

        def __init__(self, decision: Decision, message: str | None = None, scope: str = "") -> None:
            RateLimitExceeded.__init__(self, decision, message, scope)
            self.response = None
            self.description = self.message

        def get_response(self, *_: object, **__: object) -> Any:
            return Response(self.body(), 429, self.limit_headers, content_type="application/json")

        def __str__(self) -> str:
            return self.message

    FlaskRateLimitExceeded.__name__ = FlaskRateLimitExceeded.__qualname__ = "RateLimitExceeded"
    return FlaskRateLimitExceeded


def loaded(module: str) -> Any:
    """A framework's module if the program has imported it: no framework is imported for code that does not use it.

    Returns:
        The module or None.
    """
    return sys.modules.get(module)
