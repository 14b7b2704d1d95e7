"""What the client's one body asks of whoever drives it: to send a question, or to wait. No I/O here."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

from tidegate.client.server_url import Server


class HttpRequest:
    """One request to one server. It has no representation of its own: keys stand in it.

    Args:
        server: whom to ask.
        method: of HTTP.
        target: path on the server.
        headers: names and values as bytes.
        body: as bytes; empty for none.
        connect_by: until when a connection may be made, monotonic s.
        answer_by: until when the whole answer must be there, monotonic s.
    """

    __slots__ = ("answer_by", "body", "connect_by", "headers", "method", "server", "target")

    def __init__(
        self,
        server: Server,
        method: bytes,
        target: bytes,
        headers: list[tuple[bytes, bytes]],
        body: bytes,
        connect_by: float,
        answer_by: float,
    ) -> None:
        self.server = server
        self.method = method
        self.target = target
        self.headers = headers
        self.body = body
        self.connect_by = connect_by
        self.answer_by = answer_by


class Pause:
    """A wait.

    Args:
        seconds: how long, s.
    """

    __slots__ = ("seconds",)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class Reply:
    """What a server answered.

    Args:
        status: of HTTP.
        headers: names as they came, and values.
        body: as it came.
    """

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body


class TransportFailure:
    """That no answer came.

    Args:
        reason: why, as a part of a sentence about the server.
        sent: whether the question may have reached it. Then it may have been counted.
        its_fault: whether the server is to blame, not the client's own pool.
    """

    __slots__ = ("its_fault", "reason", "sent")

    def __init__(self, reason: str, *, sent: bool, its_fault: bool = True) -> None:
        self.reason = reason
        self.sent = sent
        self.its_fault = its_fault


T = TypeVar("T")

Steps = Generator[HttpRequest | Pause, Reply | TransportFailure | None, T]
"""A body: yields what is to be done, is sent what came of it (None for a pause), and returns its result."""
