"""The listener for probes and scrapes: health, readiness, liveness and metrics, and nothing else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from tidegate.doors.http_exchange import Exchange
from tidegate.doors.http_responses import Response, error_response
from tidegate.doors.http_server import PROBES
from tidegate.doors.refusals import MethodNotAllowed, NotFound
from tidegate.doors.responses import NO_STORE
from tidegate.errors import TidegateError


class ProbePages:
    """The app.

    Args:
        pages: path → what answers `GET` there; those that are not probes are left out.
    """

    def __init__(self, pages: Mapping[str, Callable[[], Awaitable[Response]]]) -> None:
        self._pages = {path: page for path, page in pages.items() if path in PROBES}

    async def __rsgi__(self, exchange: Exchange, _: Exchange) -> None:
        """Answer one request."""
        try:
            page = self._pages.get(exchange.path)
            if page is None:
                raise NotFound(f"there is nothing at {exchange.path[:200]!r}: this port serves {', '.join(sorted(self._pages))}")
            if exchange.method not in ("GET", "HEAD"):
                raise MethodNotAllowed(f"{exchange.method} is not allowed here: use GET or HEAD", allow=("GET", "HEAD"))
            response = await page()
        except TidegateError as error:
            refusal = error_response(exchange, error, None)
            exchange.response_bytes(refusal.status, refusal.headers, refusal.body or b"")
            return
        exchange.response_bytes(response.status, [("content-type", response.content_type), NO_STORE], response.body)
