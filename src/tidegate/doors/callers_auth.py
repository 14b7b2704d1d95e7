"""Who may call the data plane: gateways and back ends with a token of the catalog, or with a certificate that has a known name.

The end user's API key is something else: it comes with the request that is decided. A caller that is known costs one look-up of
the bytes that it sent (`is_known`); all others, and everything that is refused, go through `require`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from time import monotonic, time_ns
from typing import TYPE_CHECKING, Final, Protocol

from tidegate.catalog.caller_tokens import CHECK, CallerTokens
from tidegate.catalog.unknown_keys import UnknownKeyLimit
from tidegate.certificate_names import canonical_name
from tidegate.doors.client_address import counted_client, peer_address
from tidegate.errors import BadRequest, TidegateError

if TYPE_CHECKING:
    from tidegate.doors.http_requests import Scope

logger = logging.getLogger(__name__)

FAILURES_PER_MINUTE: Final = 60
"""Wrong tokens of one peer, after which it gets 429 instead of 401; a token that works is accepted all the same."""
FAILURES_PER_MINUTE_OVERALL: Final = 600
"""The same, of all peers."""
LOG_EVERY_S: Final = 10.0

_PREFIXES: Final = {"/v1/limit": "limit", "/v1/holds": "hold", "/v1/leases": "lease"}
_ALL: Final = "all"


class CallerUnauthenticated(TidegateError):
    """The caller has no token that works, or no certificate."""

    code = "CALLER_UNAUTHENTICATED"
    status = 401


class CallerForbidden(TidegateError):
    """The caller is known, and may not do this."""

    code = "CALLER_FORBIDDEN"
    status = 403


class TooManyFailures(TidegateError):
    """Too many wrong tokens came."""

    code = "CALLER_ATTEMPTS_EXCEEDED"
    status = 429


class CallersAuth(Protocol):
    """Decides who may call."""

    def is_known(self, values: Mapping[bytes, bytes], peer_names: tuple[str, ...]) -> bool:
        """Whether the caller of a plain request is known, and may have checks decided.

        Args:
            values: of the headers, none of which came twice, by name in lower case.
            peer_names: names in the certificate of the peer.

        Returns:
            False if only `require` can say.
        """
        ...

    def is_known_call(self, metadata: Sequence[tuple[str, str | bytes]], peer_names: tuple[str, ...]) -> bool:
        """As `is_known`, for a gRPC call; see `require_metadata`."""
        ...

    async def require(self, scope: Scope, needed: str) -> None:
        """Require that the caller of a request is known and may do something.

        Args:
            needed: one of `SCOPES`.

        Raises:
            CallerUnauthenticated: if it is not known.
            CallerForbidden: if it may not do this.
            TooManyFailures: if it is not known, and too many unknown callers came.
            BadRequest: if the header with the token came twice, or cannot be read.
            CatalogUnavailable: if the token may work, and the catalog does not answer.
        """
        ...

    async def require_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]], peer: str, peer_names: tuple[str, ...], needed: str
    ) -> None:
        """As `require`, for a gRPC call.

        Args:
            metadata: names in lower case, and values.
            peer: address and port of the peer.
            peer_names: names in the certificate of the peer.
            needed: one of `SCOPES`.

        Raises:
            TidegateError: as `require`.
        """
        ...


class TokenAuth:
    """Callers with a token. See `CallersAuth`.

    Args:
        header: that carries it.
        tokens: those that work.
        clock: monotonic seconds.
    """

    def __init__(self, header: str, tokens: CallerTokens, clock: Callable[[], float] = monotonic) -> None:
        self._header = header
        self._name = header.lower()
        self._raw_name = self._name.encode()
        self._tokens = tokens
        self._known = tokens.by_value
        self._check_until_ns = tokens.check_until_ns
        self._failures = UnknownKeyLimit(FAILURES_PER_MINUTE, clock=clock)
        self._all_failures = UnknownKeyLimit(FAILURES_PER_MINUTE_OVERALL, max_clients=1, clock=clock)
        self._log = _RefusalLog(clock)

    def is_known(self, values: Mapping[bytes, bytes], peer_names: tuple[str, ...]) -> bool:  # noqa: ARG002
        """See `CallersAuth.is_known`."""
        # A look-up of bytes compares them only if their keyed hash is the same: its time says nothing about a token.
        until_ns = self._check_until_ns.get(values.get(self._raw_name))
        return until_ns is not None and time_ns() < until_ns

    def is_known_call(self, metadata: Sequence[tuple[str, str | bytes]], peer_names: tuple[str, ...]) -> bool:  # noqa: ARG002
        """See `CallersAuth.is_known_call`."""
        values = self._values(metadata)
        return len(values) == 1 and time_ns() < self._check_until_ns.get(values[0], 0)

    async def require(self, scope: Scope, needed: str) -> None:
        """See `CallersAuth.require`."""
        values = scope.headers.get_all(self._name)
        if not values and self._name in scope.headers:
            values = [""]  # the server could not read it
        await self._require([value.encode("utf-8", "surrogateescape") for value in values], peer_address(scope.client), needed)

    async def require_metadata(
        self,
        metadata: Sequence[tuple[str, str | bytes]],
        peer: str,
        peer_names: tuple[str, ...],  # noqa: ARG002 - a certificate does not count here
        needed: str,
    ) -> None:
        """See `CallersAuth.require_metadata`."""
        await self._require(self._values(metadata), peer_address(peer), needed)

    def _values(self, metadata: Sequence[tuple[str, str | bytes]]) -> list[bytes]:
        return [value.encode() if isinstance(value, str) else value for name, value in metadata if name == self._name]

    async def _require(self, values: Sequence[bytes], peer: str, needed: str) -> None:
        if len(values) > 1:
            raise self._refused(peer, BadRequest(f"{len(values)} {self._header} headers came: send one", field=self._header))
        if not values:
            raise self._refused(
                peer,
                CallerUnauthenticated(
                    f"the caller sent no token: send the {self._header} header; an operator creates tokens with "
                    "'tidegate caller-tokens create'"
                ),
            )
        value = values[0]
        token = self._known.get(value) or await self._tokens.find(value)
        if token is None or token.expired:
            raise self._refused(peer, self._failure(peer))
        if needed not in token.scopes:
            raise self._refused(
                peer, CallerForbidden(f"the token {token.name[:60]!r} has no scope {needed!r}: create one with that scope")
            )

    def _failure(self, peer: str) -> TidegateError:
        client = counted_client(peer, peer)
        wait_s = math.ceil(max(self._failures.wait_s(client), self._all_failures.wait_s(_ALL)))
        if wait_s > 0:
            return TooManyFailures(
                f"too many wrong tokens came from this address, or from all: send a token that works, or try again in {wait_s} s",
                retry_after=wait_s,
            )
        self._failures.count(client)
        self._all_failures.count(_ALL)
        return CallerUnauthenticated(
            f"the token in the {self._header} header is unknown, expired or revoked: ask an operator for a new one"
        )

    def _refused(self, peer: str, error: TidegateError) -> TidegateError:
        self._log.refused(peer, error)
        return error


class CertificateAuth:
    """Callers with a certificate that has a known name. See `CallersAuth`.

    Args:
        names: as in `[callers_auth] names`.
        clock: monotonic seconds.
    """

    def __init__(self, names: Sequence[str], clock: Callable[[], float] = monotonic) -> None:
        self._exact = frozenset(canonical_name(name) for name in names if not name.startswith("*"))
        self._suffixes = frozenset(name[1:].lower() for name in names if name.startswith("*."))
        self._any = "*" in names
        self._log = _RefusalLog(clock)
        self._permits = lru_cache(maxsize=4096)(self._matches)

    def is_known(self, values: Mapping[bytes, bytes], peer_names: tuple[str, ...]) -> bool:  # noqa: ARG002
        """See `CallersAuth.is_known`."""
        return self._permits(peer_names)

    def is_known_call(self, metadata: Sequence[tuple[str, str | bytes]], peer_names: tuple[str, ...]) -> bool:  # noqa: ARG002
        """See `CallersAuth.is_known_call`."""
        return self._permits(peer_names)

    async def require(self, scope: Scope, needed: str) -> None:  # noqa: ARG002 - a certificate has all scopes
        """See `CallersAuth.require`."""
        self._require(peer_address(scope.client), scope.peer_names)

    async def require_metadata(
        self,
        metadata: Sequence[tuple[str, str | bytes]],  # noqa: ARG002 - a token does not count here
        peer: str,
        peer_names: tuple[str, ...],
        needed: str,  # noqa: ARG002
    ) -> None:
        """See `CallersAuth.require_metadata`."""
        self._require(peer_address(peer), peer_names)

    def _require(self, peer: str, peer_names: tuple[str, ...]) -> None:
        if self._permits(peer_names):
            return
        error: TidegateError
        if peer_names:
            error = CallerForbidden(
                f"the caller's certificate is for {', '.join(peer_names)[:200]}: add one of its names to callers_auth.names"
            )
        else:
            error = CallerUnauthenticated("the caller has no certificate with a name: connect with one that tls.client_ca signed")
        self._log.refused(peer, error)
        raise error

    def _matches(self, peer_names: tuple[str, ...]) -> bool:
        return any(
            self._any or name in self._exact or (not name.startswith("*") and name[max(name.find("."), 0) :] in self._suffixes)
            for name in peer_names
        )


def scope_of(path: str) -> str:
    """What a caller needs for a path of the data plane: one of `SCOPES`."""
    # /v1/limit and /v1/limit/batch, /v1/holds and /v1/holds/{id}/settle, …
    end = path.find("/", 4)
    return _PREFIXES.get(path if end < 0 else path[:end], CHECK)


class _RefusalLog:
    """Logs refused callers for operators, at most one in `LOG_EVERY_S`: whoever is refused can send any number of requests."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._next_at = -math.inf

    def refused(self, peer: str, error: TidegateError) -> None:
        now = self._clock()
        if now >= self._next_at:
            self._next_at = now + LOG_EVERY_S
            logger.warning(
                "caller at %s refused: %s", peer or "a unix socket", error.message, extra={"ecs": {"error.code": error.code}}
            )
