"""A request of a Python framework as a limit sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from tidegate.decision import Decision
from tidegate.doors.exceeded import RateLimitExceeded
from tidegate.doors.request_headers import RequestHeaders
from tidegate.errors import TidegateError

DECISION: Final = "tidegate.decision"
"""Key of the ASGI scope and the WSGI environment under which the decision of a request is kept, for its headers."""


class RequestView(Protocol):
    """One request. `native` is the framework's object, which functions of the user get."""

    native: Any
    enabled: bool
    """Whether the application's settings let limits work."""

    @property
    def method(self) -> str:
        """HTTP method, upper-case; `WEBSOCKET` for a WebSocket."""
        ...

    def peer(self) -> str:
        """Address of the peer; empty where there is none."""
        ...

    def header(self, name: str) -> str | None:
        """The first value of a header; name in lower case."""
        ...

    def forwarding(self) -> RequestHeaders:
        """The headers that proxies set."""
        ...

    def attribute(self, name: str) -> object:
        """What the application keeps under a name for this request: `request.state`, `flask.g`, the request itself."""
        ...

    def keep(self, decision: Decision) -> Decision:
        """Remember a decision and return the strictest one so far: its headers are sent where the framework lets us."""
        ...

    def add_headers(self, result: Any, decision: Decision) -> None:
        """Add the limit headers to what a view returned, if that is a response."""
        ...

    def on_close(self, result: Any, close: Callable[[], None], function: Callable[..., Any] | None) -> bool:
        """Have a function called when the last byte of the response was sent, or it was abandoned.

        Args:
            result: what a view returned, or the response of the framework.
            close: the function.
            function: the view; None for the response of the framework.

        Returns:
            Whether it will be called: not where the result is no response whose end is known.
        """
        ...

    def denied(self, decision: Decision, message: str | None, scope: str) -> RateLimitExceeded:
        """The exception that the framework answers with 429."""
        ...

    def answer(self, error: TidegateError) -> Any:
        """What a view returns in place of raising; None where the exception is raised."""
        ...

    def failure(self, error: TidegateError) -> Exception:
        """For an error that is not a denial, such as a store that does not answer: the exception that the framework answers
        with its status; the error itself where there is none."""
        ...


def stricter(one: Decision, other: Decision) -> Decision:
    """Of two decisions for one request the one whose headers are sent: a denial, else the one with less left."""
    if one.allowed != other.allowed:
        return other if one.allowed else one
    if one.remaining is None or other.remaining is None:
        return other if one.remaining is None else one
    return other if other.remaining <= one.remaining else one
