"""The current request, for log lines and spans: its id, its trace and its check.

A door stores the headers once; they are parsed only when needed. Each request runs in its own task, and the context variable set
here is visible in that task only.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final, NamedTuple, Protocol

from tidegate.decision import Check
from tidegate.observation import Observation

REQUEST_ID: Final = "x-request-id"
_VERSION_0_CHARACTERS: Final = 55

_ID: Final = re.compile(r"[!-~]{1,128}", re.ASCII)
# https://www.w3.org/TR/trace-context/#traceparent-header; later versions may add fields, and version 'ff' is invalid.
_TRACEPARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?", re.ASCII
)


class Headers(Protocol):
    """The headers of a request; names in lower case."""

    def get(self, key: str, /) -> Any:
        """The value of a header."""
        ...


class Parent(NamedTuple):
    """The caller's span: 32 hex digits, 16 hex digits, and whether the caller records it."""

    trace_id: str
    span_id: str
    recorded: bool


class Request:
    """One request in flight.

    Args:
        headers: the headers received.
        sampled: whether the access log writes this request.
        peer: address of the peer, in the form of the door's server.
        trusts: whether the trace headers of a peer are trusted; None trusts all.

    Attributes:
        check: the check of this request, if a door recorded it.
        observation: the observation of the gate, if the request is sampled.
        over: whether it was answered. A task started during the request that outlives it (of a connection, for example) still has
            it in its context, but is no longer part of it.
    """

    __slots__ = ("_headers", "_id", "_peer", "_trusts", "check", "observation", "over", "sampled")

    def __init__(
        self, headers: Headers, sampled: bool = False, peer: str = "", trusts: Callable[[str], bool] | None = None
    ) -> None:
        self._headers = headers
        self._peer = peer
        self._trusts = trusts
        self._id: str | None = None
        self.check: Check | None = None
        self.observation: Observation | None = None
        self.sampled = sampled
        self.over = False

    @property
    def id(self) -> str:
        """The value of `X-Request-Id` if it has 1 to 128 visible ASCII characters; else a random id."""
        if self._id is None:
            value = self._headers.get(REQUEST_ID)
            self._id = value if value is not None and _ID.fullmatch(value) else secrets.token_hex(16)
        return self._id

    @property
    def parent(self) -> Parent | None:
        """The caller's span, from a valid W3C `traceparent` of a trusted peer; else None.

        From an untrusted peer it could force or suppress tracing, or attach checks to the trace of another caller.
        """
        value = (self._headers.get("traceparent") or "").strip()
        found = _TRACEPARENT.fullmatch(value)
        if found is None or (value.startswith("00") and len(value) != _VERSION_0_CHARACTERS):
            return None
        if self._trusts is not None and not self._trusts(self._peer):
            return None
        return Parent(found[1], found[2], bool(int(found[3], 16) & 1))


CURRENT: Final[ContextVar[Request | None]] = ContextVar("tidegate_request", default=None)


def note(check: Check) -> None:
    """Record the check of the current request."""
    request = current()
    if request is not None:
        request.check = check


def current() -> Request | None:
    """The request of this task; None outside a request and after its answer."""
    request = CURRENT.get()
    return None if request is None or request.over else request
