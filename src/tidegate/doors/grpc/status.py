"""How a gRPC call ends that is not answered."""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """The codes of gRPC that this door gives."""

    INVALID_ARGUMENT = 3
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class CallRefused(Exception):
    """A call that ends with an error of gRPC; what Envoy then does, its `failure_mode_deny` says.

    Args:
        status: its code.
        message: one sentence for a person: what, with which value, and the remedy.
    """

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
