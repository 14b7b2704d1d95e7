"""The request that is being answered, for whoever writes a log line or a span meanwhile: its id, its trace, its check.

A door says once what headers came; they are read when somebody asks. Each request runs in a task of its own, and what it sets
here is seen in that task alone.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final, NamedTuple, Protocol

from tidegate.decision import Check, Observation

REQUEST_ID: Final = "x-request-id"
_VERSION_0_CHARACTERS: Final = 55

_ID: Final = re.compile(r"[!-~]{1,128}", re.ASCII)
# https://www.w3.org/TR/trace-context/#traceparent-header; later versions may add fields, and 'ff' is none.
_TRACEPARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?", re.ASCII
)


class Headers(Protocol):
    """What a door has read; names in lower case."""

    def get(self, key: str, /) -> Any:
        """The value of a header."""
        ...


class Parent(NamedTuple):
    """The caller's span.

    Args:
        trace_id: 32 hex digits.
        span_id: 16 hex digits.
        recorded: whether the caller records it.
    """

    trace_id: str
    span_id: str
    recorded: bool


class Request:
    """One request that is being answered.

    Args:
        headers: that came.
        wanted: whether somebody wants to know what the gate saw.
        peer: who connected, as the door's server writes it.
        trusts: whether the trace headers of a peer are believed, asked when they are needed; None where all are.

    Attributes:
        check: what it asks to decide, where a door noted it.
        seen: what the gate saw, where somebody wants to know.
        wanted: whether somebody wants to know.
        over: whether it was answered. A task that was begun meanwhile and lives on (a connection's, say) still sees the request,
            and must not be told apart by it any more.
    """

    __slots__ = ("_headers", "_id", "_peer", "_trusts", "check", "over", "seen", "wanted")

    def __init__(
        self, headers: Headers, wanted: bool = False, peer: str = "", trusts: Callable[[str], bool] | None = None
    ) -> None:
        self._headers = headers
        self._peer = peer
        self._trusts = trusts
        self._id: str | None = None
        self.check: Check | None = None
        self.seen: Observation | None = None
        self.wanted = wanted
        self.over = False

    @property
    def id(self) -> str:
        """The id that came as `X-Request-Id`, 1 to 128 visible ASCII characters; else one is made."""
        if self._id is None:
            came = self._headers.get(REQUEST_ID)
            self._id = came if came is not None and _ID.fullmatch(came) else secrets.token_hex(16)
        return self._id

    @property
    def parent(self) -> Parent | None:
        """The caller's span, from a valid W3C `traceparent` of a trusted peer; else None.

        Anybody else could have every check traced, or none, or tie it to a trace of other people's.
        """
        came = (self._headers.get("traceparent") or "").strip()
        found = _TRACEPARENT.fullmatch(came)
        if found is None or (came.startswith("00") and len(came) != _VERSION_0_CHARACTERS):
            return None
        if self._trusts is not None and not self._trusts(self._peer):
            return None
        return Parent(found[1], found[2], bool(int(found[3], 16) & 1))


CURRENT: Final[ContextVar[Request | None]] = ContextVar("tidegate_request", default=None)


def note(check: Check) -> None:
    """Let whoever writes about the present request know what it asks.

    Args:
        check: what it asks to decide.
    """
    request = current()
    if request is not None:
        request.check = check


def current() -> Request | None:
    """The request that is being answered here.

    Returns:
        The request, None outside of any.
    """
    request = CURRENT.get()
    return None if request is None or request.over else request
