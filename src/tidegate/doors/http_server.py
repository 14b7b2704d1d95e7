"""The data plane's HTTP server: one event loop, one thread, connections bounded in number and in the time they may take.

What arrives in one turn of the event loop is parsed first, then decided, then written: each phase finds its code and data in the
processor's caches. `Connection` is one connection; this module has what they share.

Above `max_connections` the connection that has waited longest without a request makes room. Where every one is being answered,
up to `RESERVED` more are accepted for probes (health, metrics) alone, so that an overloaded instance can still be probed.

TLS handshakes in progress count as connections, but never evict one that is open: at their bound the oldest of them is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import types
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Generator
from contextvars import copy_context
from email.utils import formatdate
from functools import partial
from typing import Any, Final, cast

from tidegate import time_slice
from tidegate.doors.accept_queue import accept_queued
from tidegate.doors.continuation import Continuation
from tidegate.doors.head_layouts import HeadLayouts
from tidegate.doors.http_connection import Connection
from tidegate.doors.http_exchange import PHRASES, Exchange, PlainRequest
from tidegate.doors.refusals import ClientNotAllowed, InternalError, TooManyConnections
from tidegate.doors.tls import ServerTls
from tidegate.doors.tls_acceptor import TlsAcceptor
from tidegate.errors import TidegateError

logger = logging.getLogger(__name__)

RESERVED: Final = 64
PROBES: Final = frozenset(("/health", "/livez", "/metrics", "/readyz"))
BACKLOG: Final = 1024
_PLAIN_STATUSES: Final = (200, 204, 429)
_LINGER_S: Final = 2.0
_TICK_S: Final = 0.5
_LAST_REQUEST_S: Final = 0.5
"""How long, after the listening socket has closed, an accepted connection may take to send the request that it was opened for."""
_MAX_PASSED: Final = 64
_LOOK_EVERY: Final = 16
"""So many plain answers, of about 10 µs, are given between two looks at the clock."""


class HttpServer:
    """Serves one RSGI-like app on sockets.

    Args:
        app: has `__rsgi__(scope, proto)`; an `Exchange` is both. It may have `answer_now(request)`, called for plain
            requests: it answers before it returns None, or returns what answers when awaited. That runs as a `Continuation`, or
            as any other answer if the request was opened. It may have `layouts`, by which heads of plain requests are read, and
            `begin_turn()` and `end_turn()`, called around those of one turn of the loop.
        header_timeout_s: how long a request's head may take, from its first byte or the connection's start, s.
        idle_timeout_s: how long a connection may wait for its next request, s.
        write_timeout_s: how long a client may leave its answers untaken, s.
        max_connections: most open at a time, 1 or more.
        tls: certificate, and names that clients need; None without TLS.

    Attributes:
        refused: connections that were closed at once because all were in use.
        evicted: connections that were closed while they waited, to make room.
        tick: how often time-outs were looked at; no table is more exact.
        date_line: the Date header of an answer made now.
        layouts: of the app; None where it has none.
        heads: the status line and the Date header of one, by status.
        undecided: requests that the app will be asked about in this turn of the loop, see `decide`.
        refused_names: connections of clients whose certificate has none of the names that it needs.
    """

    def __init__(
        self,
        app: Any,
        header_timeout_s: float = 10.0,
        idle_timeout_s: float = 75.0,
        write_timeout_s: float = 30.0,
        max_connections: int = 10_000,
        tls: ServerTls | None = None,
    ) -> None:
        self.header_timeout_s = header_timeout_s
        self.refused_names = 0
        self.refused = self.evicted = self.tick = 0
        self.date_line = ""
        self.heads: dict[int, bytes] = {}
        self.blocked: OrderedDict[Connection, float] = OrderedDict()
        self._app = app
        self.layouts: HeadLayouts | None = getattr(app, "layouts", None)
        self._answer_now: Callable[[PlainRequest], Coroutine[Any, Any, None] | None] | None = getattr(app, "answer_now", None)
        self._begin_turn: Callable[[], None] | None = getattr(app, "begin_turn", None)
        self._end_turn: Callable[[], None] | None = getattr(app, "end_turn", None)
        self._idle_timeout_s = idle_timeout_s
        self._write_timeout_s = write_timeout_s
        self._max_connections = max_connections
        self._tls = tls
        self._max_handshakes = max(max_connections // 2, 1)
        self._acceptor: TlsAcceptor | None = None
        self._connections: set[Connection] = set()
        self._reading: OrderedDict[Connection, float] = OrderedDict()
        self._idle: OrderedDict[Connection, float] = OrderedDict()
        self._lingering: OrderedDict[Connection, float] = OrderedDict()
        self.undecided: list[Exchange | PlainRequest] = []
        self._unwritten: list[Connection] = []
        self._server: asyncio.Server | None = None
        self._listening: socket.socket | None = None
        self._stopping = False
        self._ticking: asyncio.TimerHandle | None = None
        self._empty: asyncio.Event | None = None

    @property
    def connections(self) -> int:
        """How many are open, with those whose TLS handshake is in progress."""
        return len(self._connections) + len(self._acceptor or ())

    @property
    def handshakes_refused(self) -> dict[str, int]:
        """TLS connections that were refused, by reason: `failed`, `dropped` to make room for others, or `client_name`."""
        failures = {} if self._acceptor is None else self._acceptor.failures
        return {"client_name": self.refused_names, **{each: failures.get(each, 0) for each in ("dropped", "failed")}}

    @property
    def half_closes(self) -> bool:
        """Whether a client that sends no more can still be answered; not with TLS on asyncio."""
        return self._tls is None

    async def start(self, listening: socket.socket) -> None:
        """Accept connections.

        Args:
            listening: bound; it is closed with the server.
        """
        self._loop = asyncio.get_running_loop()
        self.now: Callable[[], float] = self._loop.time
        self._tick()
        if self._tls is not None:
            self._acceptor = TlsAcceptor(
                listening, self._tls, lambda: Connection(self), self.header_timeout_s, self._handshakes_are_many
            )
            self._acceptor.start(BACKLOG)
            return
        self._listening = listening.dup()  # to accept what is queued when the server has closed its own
        create = self._loop.create_unix_server if listening.family == socket.AF_UNIX else self._loop.create_server
        self._server = await create(lambda: Connection(self), sock=listening, backlog=BACKLOG)

    async def stop_accepting(self) -> None:
        """Close the listening socket, after accepting what is queued; open connections are served as before."""
        if self._acceptor is not None:
            self._acceptor.stop_accepting()
        listening, self._listening = self._listening, None
        if listening is None:
            return
        with listening:
            if self._server is None:
                return
            self._server.close()
            queued = accept_queued(listening)
        for accepted in queued:
            try:
                await self._loop.connect_accepted_socket(lambda: Connection(self), accepted)
            except OSError:  # its client has left
                accepted.close()

    async def stop(self, timeout_s: float) -> None:
        """Accept no more, close what waits, finish what is being answered.

        A connection that has just been accepted, or on which a request has begun to arrive, is given a moment to send it.

        Args:
            timeout_s: for how long to wait for that.
        """
        self._stopping = True
        await self.stop_accepting()
        if self._server is None and self._acceptor is None:
            return
        last_request_s = min(_LAST_REQUEST_S, timeout_s / 2)
        if self._acceptor is not None:
            await self._acceptor.close(last_request_s)
        self._server = self._acceptor = None
        self._empty = asyncio.Event()
        for connection in list(self._connections):
            if connection.table is self._reading:
                connection.closing = True
            else:
                connection.shut_down()
        self._loop.call_later(last_request_s, self._shut_down_all)
        if self._connections:
            try:
                await asyncio.wait_for(self._empty.wait(), timeout_s)
            except TimeoutError:
                logger.warning("%d connections were cut: not answered or not read within %g s", self.connections, timeout_s)
                for connection in list(self._connections):
                    connection.abort()
        if self._ticking is not None:
            self._ticking.cancel()

    def _shut_down_all(self) -> None:
        for connection in list(self._connections):
            connection.shut_down()

    def decide(self, request: Exchange | PlainRequest) -> None:
        """Have the app answer a request, after all that arrived in this turn of the loop was parsed.

        Args:
            request: whose turn it is on its connection.
        """
        if not self.undecided:
            self._loop.call_soon(self._decide)
        self.undecided.append(request)

    def _decide(self) -> None:
        if self._begin_turn is None or self._end_turn is None:
            self._decide_all()
            return
        self._begin_turn()
        try:
            self._decide_all()
        finally:
            self._end_turn()

    def _decide_all(self) -> None:
        undecided, self.undecided = self.undecided, []
        answer_now = self._answer_now
        clock_ns = time.perf_counter_ns
        end_ns = clock_ns() + time_slice.SLICE_NS
        next_look = _LOOK_EVERY
        for number, request in enumerate(undecided):
            if number >= next_look:
                if clock_ns() >= end_ns:
                    # Probes, timers and what was decided already are written in between.
                    if not self.undecided:
                        self._loop.call_soon(self._decide)
                    self.undecided = undecided[number:] + self.undecided
                    return
                next_look = number + _LOOK_EVERY
            if request.connection.lost:
                continue
            if type(request) is PlainRequest:
                later = None
                if answer_now is not None:
                    later = answer_now(request)
                    if later is None:
                        continue
                next_look = number + 1  # it may have taken longer than a plain answer
                self.leave_table(request.connection)
                if later is not None and request.exchange is None:
                    Continuation(later, self._loop).start()
                else:
                    self._begin(request.open(), later)
            else:
                exchange = cast("Exchange", request)
                if exchange.answered:
                    continue
                next_look = number + 1
                if exchange.complete:
                    self._begin(exchange, None)
                else:
                    exchange.task = self._loop.create_task(self._run(exchange))

    def _begin(self, exchange: Exchange, later: Coroutine[Any, Any, None] | None) -> None:
        """Answer an exchange that has arrived."""
        running = self._run(exchange, later)
        # Most are answered without waiting for anything: those need no task. The app must not ask for its task
        # (`asyncio.timeout` does) before it has awaited something.
        context = copy_context()
        try:
            awaited = context.run(running.send, None)
        except StopIteration:
            return
        exchange.task = self._loop.create_task(_resume(running, awaited), context=context)

    async def _run(self, exchange: Exchange, later: Coroutine[Any, Any, None] | None = None) -> None:
        try:
            await (self._app.__rsgi__(exchange, exchange) if later is None else later)
        except Exception:
            logger.exception("unhandled exception while a request was answered")
        if not exchange.answered:
            exchange.refuse(InternalError("internal error of the limiter: see its log"))

    def _handshakes_are_many(self) -> bool:
        return len(self._acceptor or ()) > self._max_handshakes or self.connections > self._max_connections + RESERVED

    # -- what connections say -----------------------------------------------------------------------------------------------

    def refusal(self, connection: Connection, path: str) -> TidegateError | None:
        """Why a restricted connection is not answered for a path; None where it is."""
        if self._tls is not None and not self._allows(connection):
            return ClientNotAllowed(
                f"none of the names in the client certificate ({', '.join(connection.peer_names)[:500] or 'it has none'}) is in "
                "tls.client_names"
            )
        if path in PROBES:
            return None
        return TooManyConnections(
            "too many connections are open, and every one is in use: retry, or raise server.max_connections"
        )

    def _allows(self, connection: Connection) -> bool:
        names = () if self._tls is None else self._tls.client_names
        return not names or not names.isdisjoint(connection.peer_names)

    def admit(self, connection: Connection) -> None:
        """A connection was accepted: make room for it, or restrict it, where there are too many."""
        self._connections.add(connection)
        connection.closing = self._stopping
        if self._acceptor is not None:
            self._acceptor.completed(connection)
        if self._tls is not None and not self._allows(connection):
            self.refused_names += 1
            logger.warning(
                "refused a client whose certificate has none of tls.client_names: it has %s",
                ", ".join(connection.peer_names)[:500] or "no name",
            )
            connection.restricted = True
        if self.connections > self._max_connections:
            oldest = self._longest_waiting()
            if oldest is not None:
                self.evicted += 1
                # With TLS, closing waits for the client.
                (oldest.close if self._tls is None else oldest.abort)()
                self.forget(oldest)  # at once: others may be accepted before asyncio reports its end
            elif self.connections > self._max_connections + RESERVED:
                self.refused += 1
                connection.abort()
                return
            else:
                connection.restricted = True
        self.await_head(connection)

    def _longest_waiting(self) -> Connection | None:
        """The connection that has waited longest without a request; None where there is none."""
        for table in (self._idle, self._reading):
            # Few are busy: those whose request arrived in this turn of the loop. As many accepted in it must not pass them all.
            for _ in range(min(len(table), _MAX_PASSED)):
                connection = next(iter(table))
                if not connection.busy:
                    return connection
                self._enter(connection, table)
        return None

    def forget(self, connection: Connection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
        self.leave_table(connection)
        self.blocked.pop(connection, None)
        if self._empty is not None and not self._connections:
            self._empty.set()

    def await_head(self, connection: Connection) -> None:
        """The head of a request is on its way, or that of the first one is awaited."""
        if connection.table is not self._reading:
            self._enter(connection, self._reading)

    def await_request(self, connection: Connection) -> None:
        """All requests of a connection are answered."""
        self._enter(connection, self._idle)
        connection.tick = self.tick

    def linger(self, connection: Connection) -> None:
        """A connection has its last answer; what the client still sends is discarded for a while."""
        self._enter(connection, self._lingering)

    def leave_table(self, connection: Connection) -> None:
        """A connection waits for nothing any more."""
        if connection.table is not None:
            connection.table.pop(connection, None)
            connection.table = None
        connection.tick = -1  # the next answer puts it into a table again

    def written(self, connection: Connection) -> None:
        """A connection has something to write: all of them write at the end of this turn."""
        self._unwritten.append(connection)
        if len(self._unwritten) == 1:
            self._loop.call_soon(self._flush)

    def _enter(self, connection: Connection, table: OrderedDict[Connection, float]) -> None:
        self.leave_table(connection)
        table[connection] = self.now()
        connection.table = table

    def _flush(self) -> None:
        unwritten, self._unwritten = self._unwritten, []
        for connection in unwritten:
            connection.flush()

    def _tick(self) -> None:
        """Give the Date anew, and end what has taken too long: each table has the longest waiting first."""
        self.date_line = f"date: {formatdate(time.time(), usegmt=True)}\r\n"
        self.tick += 1
        self.heads = {status: (PHRASES[status] + self.date_line).encode() for status in _PLAIN_STATUSES}
        now = self.now()
        for table, most_s, end in (
            (self._reading, self.header_timeout_s, Connection.time_out),
            (self._idle, self._idle_timeout_s, Connection.finish),
            (self._lingering, _LINGER_S, Connection.abort),
            (self.blocked, self._write_timeout_s, Connection.abort),
        ):
            while table:
                connection, since = next(iter(table.items()))
                if now - since < most_s:
                    break
                if table is not self.blocked:
                    if connection.busy and table is not self._lingering:
                        self._enter(connection, table)  # its request arrived in this turn of the loop
                        continue
                    connection.table = None
                del table[connection]
                end(connection)
        self._ticking = self._loop.call_later(min(_TICK_S, self.header_timeout_s / 4), self._tick)


async def _resume(running: Coroutine[Any, Any, None], awaited: Any) -> None:
    """Go on, as a task, with a coroutine that has begun without one and awaits something."""
    await _steps(running, awaited)


@types.coroutine
def _steps(running: Coroutine[Any, Any, None], awaited: Any) -> Generator[Any, Any, None]:
    while True:
        try:
            result = yield awaited
        except BaseException as error:  # noqa: BLE001 - handed on to the coroutine
            step: Callable[[], Any] = partial(running.throw, error)
        else:
            step = partial(running.send, result)
        try:
            awaited = step()
        except StopIteration:
            return
