"""Who may call `ShouldRateLimit`: `callers_auth` for gRPC. Health checks need nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from tidegate.catalog.caller_tokens import CHECK
from tidegate.doors.callers_auth import CallersAuth
from tidegate.doors.grpc.status import CallRefused, Status
from tidegate.doors.outward import outward
from tidegate.errors import TidegateError
from tidegate.observation import Observation

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]

_STATUSES: Final = {
    400: Status.INVALID_ARGUMENT,
    401: Status.UNAUTHENTICATED,
    403: Status.PERMISSION_DENIED,
    429: Status.RESOURCE_EXHAUSTED,
}


class GrpcCallers:
    """Requires that callers are known, as gRPC statuses.

    Args:
        callers: who may call.
        observe: called for each call that is refused.
    """

    def __init__(self, callers: CallersAuth, observe: Callable[[Observation], None] | None = None) -> None:
        self._callers = callers
        self._observe = observe

    def is_known(self, metadata: Metadata, peer_names: tuple[str, ...] = ()) -> bool:
        """Whether the caller is known; False if only `require` can say."""
        return self._callers.is_known_call(metadata, peer_names)

    async def require(self, metadata: Metadata, peer: str, peer_names: tuple[str, ...] = ()) -> None:
        """Require that the caller is known and may have checks decided.

        Args:
            metadata: of the call.
            peer: as gRPC writes it, such as `ipv4:127.0.0.1:4711` or `ipv6:[::1]:4711`, brackets percent-encoded or not.
            peer_names: names in the certificate of the peer.

        Raises:
            CallRefused: if not.
        """
        address = peer.partition(":")[2].replace("%5B", "[").replace("%5D", "]")
        try:
            await self._callers.require_metadata(metadata, address, peer_names, CHECK)
        except TidegateError as error:
            if self._observe is not None:
                self._observe(Observation(None, error.code, 0))
            raise CallRefused(_STATUSES.get(error.status, Status.UNAVAILABLE), outward(error)[0]) from None
