"""The gRPC listener with TLS, on grpcio: pygrpc-native has no TLS.

Same services and health as `GrpcListener`; a call costs several times as much, see docs/security.md.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final, cast

# Before grpc is imported: else every failed handshake writes a line to stderr that is not in the format of the log.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import grpc
import grpc.aio

from tidegate.certificate_names import certificate_names
from tidegate.doors.client_address import TrustedProxies, peer_address
from tidegate.doors.grpc.callers import GrpcCallers
from tidegate.doors.grpc.health import HealthService
from tidegate.doors.grpc.listener import KEEPALIVE_S, MAX_METADATA_BYTES, MAX_STREAMS
from tidegate.doors.grpc.messages import OK, OVER_LIMIT, RateLimitResponse
from tidegate.doors.grpc.service import RateLimitService
from tidegate.doors.grpc.status import CallRefused, Status
from tidegate.doors.tls import TlsFiles
from tidegate.errors import SettingsError
from tidegate.listen_address import join_address
from tidegate.telemetry.access import AccessLog
from tidegate.telemetry.requests import CURRENT, Request

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S: Final = 10
MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
_SERVICE: Final = "envoy.service.ratelimit.v3.RateLimitService"
_PATH: Final = f"/{_SERVICE}/ShouldRateLimit"
_KINDS: Final = (("peer_dns", "DNS"), ("peer_uri", "URI"), ("peer_ip", "IP Address"))
_CODES: Final = {OK: "OK", OVER_LIMIT: "OVER_LIMIT"}
_STATUSES: Final = {code.value[0]: code for code in grpc.StatusCode}


class GrpcTlsListener:
    """The two services on one address, with TLS.

    Args:
        service: the rate limit service.
        host: address to listen at.
        port: 1 to 65535.
        certificates: returns what the next handshake uses.
        client_names: names of which a client's certificate needs one, in canonical form; empty for any.
        shares_port: share the port with other processes, as workers do.
        access: the access log; None if disabled.
        reads_metadata: whether metadata is also needed for tracing.
        trusted: peers whose `traceparent` is trusted; loopback by default.
        callers: who may call; None for anyone.

    Attributes:
        in_flight: calls being answered, without `Watch` streams.
        answered: total number of calls answered.
    """

    def __init__(
        self,
        service: RateLimitService,
        host: str,
        port: int,
        certificates: Callable[[], TlsFiles],
        client_names: frozenset[str] = frozenset(),
        shares_port: bool = False,
        access: AccessLog | None = None,
        reads_metadata: bool = False,
        trusted: TrustedProxies | None = None,
        callers: GrpcCallers | None = None,
    ) -> None:
        self.in_flight = 0
        self.answered = 0
        self._service = service
        self._address = join_address(host, port)
        self._certificates = certificates
        self._client_names = client_names
        self._shares_port = shares_port
        self._access = access
        self._reads_metadata = reads_metadata or access is not None
        self._trusted = trusted or TrustedProxies()
        self._callers = callers
        self._health = HealthService(self._send)
        self._streams: dict[int, asyncio.Queue[bytes | None]] = {}
        self._last_stream = 0
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            SettingsError: if the address cannot be used.
        """
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", int(self._shares_port)),
                ("grpc.max_concurrent_streams", MAX_STREAMS),
                ("grpc.max_metadata_size", MAX_METADATA_BYTES),
                ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_S * 1000),
            ]
        )
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(_SERVICE, {"ShouldRateLimit": unary(self._should_rate_limit)}),
                grpc.method_handlers_generic_handler(
                    "grpc.health.v1.Health", {"Check": unary(self._check), "Watch": stream(self._watch)}
                ),
            )
        )
        try:
            server.add_secure_port(self._address, self._credentials())
        except RuntimeError:
            raise SettingsError(f"server.grpc = {self._address!r} cannot be used: see the log of the system") from None
        await server.start()
        self._server = server

    def configured(self, valid: bool) -> None:
        """See `HealthService.configured`."""
        self._health.configured(valid)

    def drain(self) -> None:
        """Report NOT_SERVING and end the `Watch` streams; calls are answered as before."""
        for stream in self._health.drain():
            self._streams[stream].put_nowait(None)

    async def stop(self, timeout_s: float) -> None:
        """Finish the calls in flight, within `timeout_s`, and close."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(timeout_s)

    def _credentials(self) -> grpc.ServerCredentials:
        used = self._certificates()

        def configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
            return grpc.ssl_server_certificate_configuration([(files.key, files.cert)], files.client_ca or None)

        def changed() -> grpc.ServerCertificateConfiguration | None:
            """For every handshake, in a thread of grpcio: None keeps what the last one used."""
            nonlocal used
            files = self._certificates()
            if files is used:
                return None
            used = files
            return configuration(files)

        fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", changed)
        return grpc.dynamic_ssl_server_credentials(configuration(used), fetch, require_client_authentication=bool(used.client_ca))

    async def _should_rate_limit(self, payload: bytes, context: Any) -> bytes:
        await self._require_name(context)
        if not self._reads_metadata:
            return await self._answer(payload, context)
        access = self._access
        sampled = access is not None and access.is_sampled()
        metadata = dict(reversed([(name, value) for name, value in context.invocation_metadata() or ()]))
        request = Request(metadata, sampled, context.peer(), self._trusts_peer)
        # Each call has its own task, so this is visible in that task only.
        CURRENT.set(request)
        started_ns = time.perf_counter_ns()
        code = Status.INTERNAL.name
        try:
            answer = await self._answer(payload, context)
            code = _CODES[RateLimitResponse.FromString(answer).overall_code]
            return answer
        except CallRefused as refused:
            code = refused.status.name
            return await _refuse(context, refused)
        finally:
            if access is not None and request.sampled:
                access.write(request, _PATH, code, time.perf_counter_ns() - started_ns)
            request.over = True

    async def _answer(self, payload: bytes, context: Any) -> bytes:
        self.in_flight += 1
        try:
            if self._callers is not None:
                await self._callers.require(context.invocation_metadata() or (), context.peer(), peer_names(context))
            return await self._service.answer(payload)
        except CallRefused as refused:
            if self._reads_metadata:
                raise
            return await _refuse(context, refused)
        except Exception:
            logger.exception("unhandled exception in a gRPC call")
            return await _refuse(context, CallRefused(Status.INTERNAL, "internal error of the rate limiter; see its log"))
        finally:
            self.in_flight -= 1
            self.answered += 1

    async def _check(self, payload: bytes, context: Any) -> bytes:
        await self._require_name(context)
        try:
            return self._health.check(payload)
        except CallRefused as refused:
            return await _refuse(context, refused)

    async def _watch(self, payload: bytes, context: Any) -> AsyncIterator[bytes]:
        await self._require_name(context)
        self._last_stream += 1
        number = self._last_stream
        states = self._streams[number] = asyncio.Queue()
        try:
            self._health.watch(number, payload)
            while (state := await states.get()) is not None:
                yield state
        except CallRefused as refused:
            await _refuse(context, refused)
        finally:
            self._health.forget(number)
            del self._streams[number]

    async def _require_name(self, context: Any) -> None:
        if self._client_names and self._client_names.isdisjoint(names := peer_names(context)):
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                f"none of the names in the client certificate ({', '.join(names)[:500] or 'it has none'}) is in tls.client_names",
            )

    def _trusts_peer(self, peer: str) -> bool:
        # ipv4:127.0.0.1:4711, ipv6:%5B::1%5D:4711
        return self._trusted.trusts(peer_address(peer.partition(":")[2].replace("%5B", "[").replace("%5D", "]")))

    def _send(self, stream: int, payload: bytes) -> bool:
        states = self._streams.get(stream)
        if states is None:
            return False
        states.put_nowait(payload)
        return True


def peer_names(context: Any) -> tuple[str, ...]:
    """The names in the certificate of a call's client, see `certificate_names`; empty without one."""
    found: dict[str, Sequence[bytes]] = context.auth_context()
    return certificate_names((kind, value.decode("utf-8", "replace")) for key, kind in _KINDS for value in found.get(key, ()))


async def _refuse(context: Any, refused: CallRefused) -> bytes:
    await context.abort(_STATUSES[refused.status.value], refused.message)
    raise AssertionError("abort raises")
