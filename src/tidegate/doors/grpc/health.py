"""`grpc.health.v1.Health`: SERVING while this instance can decide, degraded or not, until it drains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from google.protobuf.message import DecodeError

from tidegate.doors.grpc.messages import NOT_SERVING, SERVICE_UNKNOWN, SERVING, HealthCheckRequest, HealthCheckResponse
from tidegate.doors.grpc.status import CallRefused, Status

SERVICES: Final = ("", "envoy.service.ratelimit.v3.RateLimitService", "grpc.health.v1.Health")
"""Names that `Check` and `Watch` accept; the empty name is the whole server."""

MAX_WATCHERS: Final = 1000


class HealthService:
    """Answers `Check`, and sends each change to the open `Watch` streams.

    Args:
        send: sends a message on the stream with a call id; returns whether it was accepted.
    """

    def __init__(self, send: Callable[[int, bytes], bool]) -> None:
        self._send = send
        self._draining = False
        self._configured = True
        self._watchers: dict[int, str] = {}

    def check(self, payload: bytes) -> bytes:
        """Answer `Check`.

        Returns:
            A `HealthCheckResponse`.

        Raises:
            CallRefused: if the message is invalid, or the service is unknown.
        """
        service = _service(payload)
        if service not in SERVICES:
            raise CallRefused(Status.NOT_FOUND, f"service {service[:80]!r} is unknown; use {SERVICES[1]!r} or ''")
        return self._response(service)

    def watch(self, call_id: int, payload: bytes) -> None:
        """Begin a `Watch`: send the state now and after each change.

        Raises:
            CallRefused: if the message is invalid, or too many streams are open.
        """
        service = _service(payload)
        if len(self._watchers) >= MAX_WATCHERS:
            raise CallRefused(Status.RESOURCE_EXHAUSTED, f"too many open Watch calls (at most {MAX_WATCHERS}); use Check")
        self._watchers[call_id] = service
        self._send(call_id, self._response(service))

    def forget(self, call_id: int) -> None:
        """Remove a `Watch` stream that the client closed."""
        self._watchers.pop(call_id, None)

    def configured(self, valid: bool) -> None:
        """Report NOT_SERVING while `[envoy] config` has never been valid; no effect during a drain."""
        self._configured = valid
        self._notify()

    def drain(self) -> list[int]:
        """Report NOT_SERVING from now on.

        Returns:
            The call ids of the open `Watch` streams.
        """
        self._draining = True
        self._notify()
        return list(self._watchers)

    def _notify(self) -> None:
        for call_id, service in self._watchers.items():
            self._send(call_id, self._response(service))

    def _response(self, service: str) -> bytes:
        state = (SERVING if self._configured and not self._draining else NOT_SERVING) if service in SERVICES else SERVICE_UNKNOWN
        response: bytes = HealthCheckResponse(status=state).SerializeToString()
        return response


def _service(payload: bytes) -> str:
    try:
        return str(HealthCheckRequest.FromString(payload).service)
    except DecodeError:
        raise CallRefused(Status.INVALID_ARGUMENT, "the message is not a valid grpc.health.v1.HealthCheckRequest") from None
