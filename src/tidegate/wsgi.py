"""The door inside any WSGI app: Flask, Django, Pyramid, Bottle and others. Thread-safe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from http import HTTPStatus
from typing import Any, TypeAlias

from tidegate.counters import CounterStore
from tidegate.doors.exceeded import RateLimitExceeded
from tidegate.doors.limit import limit
from tidegate.doors.limited_functions import exempt
from tidegate.doors.request_view import DECISION
from tidegate.doors.responses import Headers, encode, error_body, limit_headers
from tidegate.doors.wsgi_requests import WsgiRequest, WsgiResponse
from tidegate.errors import PolicyError, TidegateError

__all__ = ["RateLimitExceeded", "RateLimitMiddleware", "exempt", "limit"]

StartResponse: TypeAlias = Callable[..., Any]
WsgiApp: TypeAlias = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]


class RateLimitMiddleware:
    """Checks each request and answers denied ones with 429.

        app = RateLimitMiddleware(app, "100/minute; 5000/day")

    `20 concurrent` among the limits counts requests until their last byte was sent.

    Args:
        app: the WSGI app.
        limits: as `limit` takes them; all requests of a client count together.
        key: whom to count, as for `limit`: `ip`, `api_key`, `header:NAME`, a key of the environment such as `REMOTE_USER`, or a
            function of the environment.
        counters: as for `limit`.
        trusted_proxies: as for `limit`.
        options: further arguments of `limit`. Functions of the response get its `status_code` and `headers`.

    Raises:
        PolicyError: if an argument is not valid.
    """

    def __init__(
        self,
        app: WsgiApp,
        limits: str | Sequence[str] | Callable[..., Any],
        *,
        key: str | Callable[..., Any] = "ip",
        counters: str | CounterStore | None = None,
        trusted_proxies: Iterable[str] = (),
        **options: Any,
    ) -> None:
        self.app = app
        self._limit = limit(limits, key=key, counters=counters, trusted_proxies=trusted_proxies, **options)

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request, or let the app do so."""
        try:
            call = self._limit.begin_blocking(WsgiRequest(environ), "wsgi")
        except RateLimitExceeded as error:
            return _answer(start_response, 429, [*error.limit_headers.items()], error.body())
        except PolicyError:
            raise  # a mistake in the program, not the client's
        except TidegateError as error:
            return _answer(start_response, error.status, [("x-tidegate-error", error.code)], encode(error_body(error)))

        started = False

        def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            nonlocal started
            if not started:
                started = True
                self._limit.end_blocking(call, WsgiResponse(status, headers))
            decision = environ.get(DECISION)
            if decision is not None and all(name.lower() != "ratelimit" for name, _ in headers):
                headers = [*headers, *limit_headers(decision)]
            return start_response(status, headers, *more)

        if not call.unfinished:
            return self.app(environ, start)

        def close() -> None:
            if not started:
                self._limit.abandon_blocking(call)
            elif call.hold is not None:
                call.hold.close()

        try:
            return _ClosingBody(self.app(environ, start), close)
        except BaseException:
            close()
            raise


class _ClosingBody:
    """The body of a response, after which a function is called: servers close it when it was sent, and when clients disconnect.

    Args:
        body: of the app.
        close: the function.
    """

    def __init__(self, body: Iterable[bytes], close: Callable[[], None]) -> None:
        self._body = body
        self._close = close

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        """See PEP 3333."""
        try:
            if callable(closes := getattr(self._body, "close", None)):
                closes()
        finally:
            self._close()


def _answer(start_response: StartResponse, status: int, headers: Headers, body: bytes) -> Iterable[bytes]:
    phrase = HTTPStatus(status).phrase
    start_response(f"{status} {phrase}", [*headers, ("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
