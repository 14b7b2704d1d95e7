"""gRPC errors of this door."""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """The gRPC status codes that this door uses."""

    INVALID_ARGUMENT = 3
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class CallRefused(Exception):
    """A call that ends with a gRPC error; Envoy's `failure_mode_deny` decides what happens to the request."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
