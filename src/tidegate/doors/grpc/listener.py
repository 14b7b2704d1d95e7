"""The interface to the HTTP/2 server, pygrpc-native: its threads pass whole calls to the event loop and send the answers.

It was chosen by measurement; see docs/dependencies.md. It does HTTP/2, flow control and flood protection (in the Rust crates
hyper and h2) without holding the GIL; a burst of calls wakes the event loop once.

The metadata of calls is read only if needed: for the caller's token, by the access log for the request id, by tracing for the
caller's span.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

from pygrpc_native import EVENT_CALL, EVENT_CANCEL, STREAM_SENT, NativeGrpcFront

from tidegate.background import SUPERVISOR, stop
from tidegate.doors.client_address import TrustedProxies, peer_address
from tidegate.doors.grpc.callers import GrpcCallers
from tidegate.doors.grpc.health import HealthService
from tidegate.doors.grpc.messages import OK, OVER_LIMIT, RateLimitResponse
from tidegate.doors.grpc.service import RateLimitService
from tidegate.doors.grpc.status import CallRefused, Status
from tidegate.errors import SettingsError
from tidegate.listen_address import join_address
from tidegate.telemetry.access import AccessLog
from tidegate.telemetry.requests import CURRENT, Request

logger = logging.getLogger(__name__)

MAX_STREAMS: Final = 256
"""Maximum concurrent calls per connection; Envoy opens another connection for more. The server buffers up to 4 MB of each."""

MAX_METADATA_BYTES: Final = 16 * 1024
KEEPALIVE_S: Final = 60
"""Idle time before a keepalive ping; a connection that does not answer it within 20 s is closed."""

SHOULD_RATE_LIMIT, CHECK, WATCH = 0, 1, 2
_METHODS: Final = (
    ("/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit", False),
    ("/grpc.health.v1.Health/Check", False),
    ("/grpc.health.v1.Health/Watch", True),
)
CallDetails: TypeAlias = tuple[Sequence[tuple[str, str | bytes]], str, float | None]
"""Metadata, peer and deadline of a call."""
_BATCH_SIZE: Final = 64
_CODES: Final = {OK: "OK", OVER_LIMIT: "OVER_LIMIT"}


class GrpcListener:
    """The two services on one address.

    Args:
        service: the rate limit service.
        host: address to listen at.
        port: 1 to 65535.
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
        shares_port: bool = False,
        access: AccessLog | None = None,
        reads_metadata: bool = False,
        trusted: TrustedProxies | None = None,
        callers: GrpcCallers | None = None,
    ) -> None:
        self.in_flight = 0
        self.answered = 0
        self._service = service
        self._health = HealthService(self._send)
        self._address = join_address(host, port)
        self._shares_port = shares_port
        self._access = access
        self._trusted = trusted or TrustedProxies()
        self._callers = callers
        self._is_observed = reads_metadata or access is not None
        self._reads_metadata = self._is_observed or callers is not None
        self._front: NativeGrpcFront | None = None
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._receiving: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None
        self._ended: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Listen.

        Raises:
            SettingsError: if the address cannot be used.
        """
        try:
            self._front = NativeGrpcFront(
                self._address,
                list(_METHODS),
                io_threads=1,
                call_details=self._reads_metadata,
                keepalive_time_ms=KEEPALIVE_S * 1000,
                max_concurrent_streams=MAX_STREAMS,
                max_metadata_size=MAX_METADATA_BYTES,
                reuse_port=self._shares_port,
            )
            self._front.start()
        except OSError as error:
            raise SettingsError(f"server.grpc = {self._address!r} cannot be used: {error.strerror or error}") from None
        self._receiving = SUPERVISOR.start("grpc_receiver", partial(self._receive, self._front))

    def configured(self, valid: bool) -> None:
        """See `HealthService.configured`."""
        self._health.configured(valid)

    def drain(self) -> None:
        """Report NOT_SERVING and end the `Watch` streams; calls are answered as before."""
        front = self._front
        if front is not None:
            for call_id in self._health.drain():
                front.stream_end(call_id)

    async def stop(self, timeout_s: float) -> None:
        """Finish the calls in flight, within `timeout_s`, and close."""
        front, self._front = self._front, None
        if front is None:
            return
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in self._tasks:
            task.cancel()
        await stop(self._receiving)
        # In a thread: closing waits for the threads of the server.
        await asyncio.to_thread(front.close)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 5)

    async def _receive(self, front: NativeGrpcFront) -> None:
        """Run the thread that receives calls, and end with its exception or when the server is closed."""
        self._ended = self._loop.create_future()
        # If this task is restarted while the thread still runs, keep the thread: only one may receive calls.
        if self._thread is None:
            self._thread = threading.Thread(target=self._receive_calls, args=(front,), name="tidegate-grpc", daemon=True)
            self._thread.start()
        await self._ended

    def _receive_calls(self, front: NativeGrpcFront) -> None:
        """In a separate thread: pass calls to the event loop until the server is closed."""
        receive: Callable[[int], Sequence[tuple[Any, ...]] | None] = (
            front.recv_batch_details if self._reads_metadata else front.recv_batch
        )
        failure: BaseException = RuntimeError("the gRPC server was closed")
        try:
            while (events := receive(_BATCH_SIZE)) is not None:
                self._loop.call_soon_threadsafe(self._dispatch, front, events)
        except Exception as error:  # noqa: BLE001 - handed to the supervised task, which logs and restarts
            failure = error
        try:
            self._loop.call_soon_threadsafe(self._thread_ended, failure)
        except RuntimeError:  # the loop was closed without a stop
            front.close()

    def _thread_ended(self, failure: BaseException) -> None:
        self._thread = None
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(failure)

    def _dispatch(self, front: NativeGrpcFront, events: Sequence[tuple[Any, ...]]) -> None:
        self._service.begin_turn()
        try:
            self._dispatch_all(front, events)
        finally:
            self._service.end_turn()

    def _dispatch_all(self, front: NativeGrpcFront, events: Sequence[tuple[Any, ...]]) -> None:
        for event in events:
            kind, call_id, method, payload = event[:4]
            if kind == EVENT_CANCEL:
                self._health.forget(call_id)
            elif kind == EVENT_CALL and payload is not None:
                if method == SHOULD_RATE_LIMIT:
                    callers = self._callers
                    if self._is_observed:
                        self._start(self._answer_observed(front, call_id, payload, event[5]))
                    elif callers is None or callers.is_known(event[5][0]):
                        self._answer_now(front, call_id, payload)
                    else:
                        self._start(self._answer(front, call_id, self._authenticated(payload, event[5])))
                else:
                    self._answer_health(front, call_id, method, payload)

    def _start(self, answering: Coroutine[Any, Any, Any]) -> None:
        task = self._loop.create_task(answering)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _answer_now(self, front: NativeGrpcFront, call_id: int, payload: bytes) -> None:
        """Answer a call; in a task only if something has to be awaited."""
        try:
            answer = self._service.answer_now(payload)
        except Exception as error:  # noqa: BLE001 - raised again where it is reported
            answer = _raise(error)
        if isinstance(answer, bytes):
            front.respond(call_id, answer)
            self.answered += 1
        else:
            self._start(self._answer(front, call_id, answer))

    async def _answer(self, front: NativeGrpcFront, call_id: int, answering: Awaitable[bytes]) -> bytes | Status:
        """Answer a call; returns the `RateLimitResponse` or the gRPC status that was sent."""
        self.in_flight += 1
        try:
            answer = await answering
            front.respond(call_id, answer)
        except CallRefused as refused:
            front.fail(call_id, refused.status, refused.message)
            return refused.status
        except Exception:
            logger.exception("unhandled exception in a gRPC call")
            front.fail(call_id, Status.INTERNAL, "internal error of the rate limiter; see its log")
            return Status.INTERNAL
        finally:
            self.in_flight -= 1
            self.answered += 1
        return answer

    async def _authenticated(self, payload: bytes, details: CallDetails) -> bytes:
        if self._callers is not None:
            await self._callers.require(details[0], details[1])
        return await self._service.answer(payload)

    async def _answer_observed(self, front: NativeGrpcFront, call_id: int, payload: bytes, details: CallDetails) -> None:
        """Answer a call that the access log or tracing observes."""
        access = self._access
        sampled = access is not None and access.is_sampled()
        request = Request(_metadata(details[0]), sampled, details[1], self._trusts_peer)
        # Each call has its own task, so this is visible in that task only.
        CURRENT.set(request)
        started_ns = time.perf_counter_ns()
        try:
            answer = await self._answer(front, call_id, self._authenticated(payload, details))
            if access is not None and request.sampled:
                took_ns = time.perf_counter_ns() - started_ns
                code = answer.name if isinstance(answer, Status) else _CODES[RateLimitResponse.FromString(answer).overall_code]
                access.write(request, _METHODS[SHOULD_RATE_LIMIT][0], code, took_ns)
        finally:
            request.over = True

    def _answer_health(self, front: NativeGrpcFront, call_id: int, method: int, payload: bytes) -> None:
        try:
            if method == CHECK:
                front.respond(call_id, self._health.check(payload))
            else:
                self._health.watch(call_id, payload)
        except CallRefused as refused:
            front.fail(call_id, refused.status, refused.message)

    def _trusts_peer(self, peer: str) -> bool:
        # ipv4:127.0.0.1:4711, ipv6:[::1]:4711
        return self._trusted.trusts(peer_address(peer.partition(":")[2]))

    def _send(self, call_id: int, payload: bytes) -> bool:
        return self._front is not None and self._front.stream_try_send(call_id, payload) == STREAM_SENT


def _metadata(pairs: Sequence[tuple[str, str | bytes]]) -> dict[str, str | bytes]:
    """The metadata of a call; the first value of each name."""
    return dict(reversed(pairs))


async def _raise(error: Exception) -> bytes:
    raise error
