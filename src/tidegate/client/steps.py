"""The steps that the client's core yields to its driver: send a request. No I/O here."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

from tidegate.server_url import Server


class HttpRequest:
    """One request to one server. It has no `repr` of its own, because it contains API keys.

    Args:
        method: HTTP method.
        target: path on the server.
        headers: names and values.
        body: empty for none.
        connect_deadline: for the connection, s on the monotonic clock.
        deadline: for the complete response, s on the monotonic clock.
    """

    __slots__ = ("body", "connect_deadline", "deadline", "headers", "method", "server", "target")

    def __init__(
        self,
        server: Server,
        method: bytes,
        target: bytes,
        headers: list[tuple[bytes, bytes]],
        body: bytes,
        connect_deadline: float,
        deadline: float,
    ) -> None:
        self.server = server
        self.method = method
        self.target = target
        self.headers = headers
        self.body = body
        self.connect_deadline = connect_deadline
        self.deadline = deadline


class Reply:
    """An HTTP response of a server; header names as received."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body


class TransportFailure:
    """The reason why there is no response.

    Args:
        reason: predicate of a sentence whose subject is the server.
        sent: whether the request may have reached the server. Then it may have been counted.
        counts_for_breaker: whether the server caused it, not the client's own pool.
    """

    __slots__ = ("counts_for_breaker", "reason", "sent")

    def __init__(self, reason: str, *, sent: bool, counts_for_breaker: bool = True) -> None:
        self.reason = reason
        self.sent = sent
        self.counts_for_breaker = counts_for_breaker


T = TypeVar("T")

Steps = Generator[HttpRequest, Reply | TransportFailure, T]
"""A generator that yields steps, receives the result of each, and returns the result of the call."""
