"""What was read from recent requests, by their bytes: gateways send the same bytes for the same client, path and method.

Only what depends on the bytes and the configuration is kept, never a decision, a caller or a limit of the policy. Entries are
kept in two generations: when the recent one is full it becomes the older one, and entries that are used again come back. So a
flood of requests that are all different does not evict those that repeat for longer than one generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import msgspec

from tidegate.decision import Check
from tidegate.doors.grpc.replies import Part
from tidegate.gate.subjects import DescriptorCheck

MAX_REQUESTS: Final = 2048
"""Maximum number of requests of one generation: with `MAX_REQUEST_BYTES`, both use at most about 8 MB."""

MAX_REQUEST_BYTES: Final = 1024
"""Longer requests are not kept; Envoy sends about 150 bytes for a descriptor with key, method, path and address."""


class FileRequest(msgspec.Struct, frozen=True):
    """A request for a domain of `[envoy] config`.

    Args:
        parts: its descriptors with the limits of the file.
        entries: the entries of each descriptor.
    """

    domain: str
    parts: list[Part]
    entries: list[list[tuple[str, str]]]


PolicyChecks: TypeAlias = Sequence[tuple[Check | DescriptorCheck, int]]
"""The checks of a request for the policy's domain, none of them an error, each with its cost."""

PreparedRequest: TypeAlias = Check | PolicyChecks | FileRequest
"""A request for the policy's domain with one descriptor that has a path, any other one for it, or one for a file's domain."""


class RequestCache:
    """The recent requests; `clear` it when the configuration that they were read with changes."""

    __slots__ = ("_older", "_recent")

    def __init__(self) -> None:
        self._recent: dict[bytes, PreparedRequest] = {}
        self._older: dict[bytes, PreparedRequest] = {}

    def __len__(self) -> int:
        return len(self._recent) + len(self._older)

    def find(self, payload: bytes) -> PreparedRequest | None:
        """The request with these bytes, if it is known. Costs 0.2 µs."""
        found = self._recent.get(payload)
        if found is None and self._older:
            found = self._older.pop(payload, None)
            if found is not None:
                self.add(payload, found)
        return found

    def add(self, payload: bytes, request: PreparedRequest) -> None:
        """Keep a request, unless it is long."""
        if len(payload) > MAX_REQUEST_BYTES:
            return
        if len(self._recent) >= MAX_REQUESTS:
            self._older, self._recent = self._recent, {}
        self._recent[payload] = request

    def clear(self) -> None:
        """Remove all."""
        self._recent, self._older = {}, {}
