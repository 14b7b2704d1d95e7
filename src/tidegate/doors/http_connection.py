"""One connection of the HTTP server: a queue of exchanges, answered in the order of their requests.

One exchange of a connection is answered at a time; the ones behind it wait in the order they came. The connection is not read
while many wait, while a body is not consumed, and while the client does not take its answers.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Final, cast

from tidegate.doors.client_address import peer_address
from tidegate.doors.http_exchange import Exchange, PlainRequest, RequestHeaders
from tidegate.doors.http_parser import BODY, HEAD, MAX_HEAD_BYTES, MAX_HEADERS, RequestParser
from tidegate.doors.peer_names import peer_names
from tidegate.doors.refusals import RequestTooSlow
from tidegate.errors import TidegateError
from tidegate.listen_address import join_address

if TYPE_CHECKING:
    from tidegate.doors.http_server import HttpServer

__all__ = ["MAX_HEADERS", "MAX_HEAD_BYTES", "MAX_WAITING", "Connection"]

MAX_WAITING: Final = 32
"""So many pipelined requests may wait behind the one being answered before the connection is not read."""
MAX_LINGER_BYTES: Final = 1024 * 1024
"""So much of a refused request is read and discarded, so that the client can read the answer before the connection ends."""

_WRITE: Final = 1
_LINE: Final = 2
_BODY: Final = 4
"""Why a connection is not read: its client does not take the answers, many requests wait, a body is not consumed."""


class Connection(RequestParser, asyncio.Protocol):
    """The parser and the queue of one connection.

    Args:
        server: that accepted it.

    Attributes:
        server: that accepted it.
        client: address and port of the peer, `host:port`; empty where it has none (a unix socket).
        peer: the address alone, without brackets.
        peer_names: names in the certificate of the peer, see `peer_names.certificate_names`; empty without mutual TLS.
        lost: whether there is no one to answer any more.
        closing: whether the connection ends after what is being answered.
        restricted: whether `HttpServer.refusal` decides what it is answered for: it came above the limit of connections, or the
            names of its peer are not allowed.
        table: the server's table that it waits in: for a head, for the next request, or to be closed; None while it is answered.
            A request that is answered in the turn of the loop in which it arrived does not move it.
        tick: of the server, when it was put into that table.
    """

    __slots__ = (
        "_current",
        "_ends",
        "_eof",
        "_linger_bytes",
        "_out",
        "_pauses",
        "_transport",
        "_waiting",
        "client",
        "closing",
        "lost",
        "peer",
        "peer_names",
        "restricted",
        "server",
        "table",
        "tick",
    )

    def __init__(self, server: HttpServer) -> None:
        super().__init__(server.layouts)
        self.server = server
        self.client = self.peer = ""
        self.peer_names: tuple[str, ...] = ()
        self.closing = self.lost = False
        self.restricted = False
        self.table: OrderedDict[Connection, float] | None = None
        self.tick = -1
        self._transport: asyncio.Transport | None = None
        self._current: Exchange | PlainRequest | None = None
        self._waiting: deque[Exchange | PlainRequest] = deque()
        self._out: list[bytes] = []
        self._linger_bytes = 0
        self._eof = False
        self._ends = False  # once what is to be sent is written
        self._pauses = 0

    # -- the transport ------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accepted: the head of the first request is awaited."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is not derived from it
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.client = join_address(peer[0], peer[1])
            self.peer = peer_address(self.client)
        self.peer_names = peer_names(transport)
        self.server.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Gone. A check that is whole is decided to its end; one whose body will not come is given up."""
        self._stopped = self.closing = self.lost = True
        self._waiting.clear()
        current = self._current
        self._last = None
        if type(current) is PlainRequest:
            self._current = None  # it refers to this connection, and garbage collection does not look at it
        elif isinstance(current, Exchange) and not current.complete and current.task is not None:
            current.task.cancel()
        self._transport = None
        self.server.forget(self)

    def data_received(self, data: bytes) -> None:
        """Parse what came; whole requests are put in line."""
        if self._stopped:
            self._linger_bytes += len(data)
            if self._linger_bytes > MAX_LINGER_BYTES:
                self.abort()
            return
        if not self.parse(data) and self._current is None and self._part != BODY and not self._stopped:
            self.server.await_head(self)

    def eof_received(self) -> bool:
        """The client sends no more; its requests are still answered."""
        self._eof = True
        partial = self._receiving is not None or self._part == HEAD
        return not partial and (self._current is not None or bool(self._waiting)) and self.server.half_closes

    def pause_writing(self) -> None:
        """The client does not take its answers: nothing more is read or decided for it until it does."""
        self._pause(_WRITE)
        self.server.blocked[self] = self.server.now()

    def resume_writing(self) -> None:
        """It does again."""
        self.server.blocked.pop(self, None)
        self._resume(_WRITE)
        if self._current is None and self._waiting:
            self._start(self._waiting.popleft())

    # -- the line -----------------------------------------------------------------------------------------------------------

    def enqueue(self, request: Exchange | PlainRequest) -> None:
        """See `RequestParser.enqueue`; it is decided after all that arrived in this turn of the loop was parsed."""
        if self._current is None and not self._pauses & _WRITE:
            self._start(request)
            return
        self._waiting.append(request)
        if len(self._waiting) >= MAX_WAITING:
            self._pause(_LINE)

    def enqueue_plain(self, request: PlainRequest) -> None:
        """See `enqueue`."""
        if self._current is None and not self._pauses and not self.restricted:
            self._current = request
            server = self.server
            if server.undecided:  # `decide`, written out
                server.undecided.append(request)
            else:
                server.decide(request)
        else:
            self.enqueue(request)

    def repeat(self, request: PlainRequest) -> None:
        """See `RequestParser.repeat`. The record is used again where nothing else uses it."""
        if self._current is None and request.exchange is None and not self._waiting and not self._pauses and not self.restricted:
            request.repeats = True
            self._current = request
            self.server.decide(request)
        else:
            again = PlainRequest(self, request.method, request.target, request.sent, request.body, request.head_bytes)
            again.data, again.facts = request.data, request.facts
            if request.exchange is not None:
                self._last = again  # one that was opened is never used again
            self.enqueue(again)

    def _start(self, request: Exchange | PlainRequest) -> None:
        self._current = request
        if type(request) is PlainRequest and not self.restricted:
            self.server.decide(request)
            return
        self.server.leave_table(self)
        exchange = request.open() if type(request) is PlainRequest else cast("Exchange", request)
        refusal = exchange.refusal
        if refusal is None and self.restricted:
            refusal = self.server.refusal(self, exchange.path)
        if refusal is not None:
            self._stopped = self._lingers = True
            exchange.refuse(refusal)
        else:
            self.server.decide(exchange)

    def answer(self, exchange: Exchange, data: bytes, closes: bool) -> None:
        """Send the answer of the exchange whose turn it is, and begin with the next one.

        Args:
            exchange: whose answer it is.
            data: the whole answer.
            closes: whether the connection ends with it.
        """
        if exchange is not self._current:
            return  # given up: the connection is gone
        self.send(data)
        self._current = None
        if closes or self.closing:
            self._lingers = self._lingers or not exchange.complete
            self.finish()
            return
        self._go_on()

    def replace(self, request: PlainRequest, exchange: Exchange) -> None:
        """Have an exchange in the place of the same request."""
        if self._current is request:
            self._current = exchange

    def answer_plain(self, request: PlainRequest, data: bytes) -> None:
        """As `answer`, for a connection that goes on; the event loop writes at the end of its turn.

        Args:
            request: whose answer it is.
            data: the whole answer.
        """
        transport = self._transport
        if request is not self._current or transport is None:
            return  # given up: the connection is gone
        if self._out:
            self._out.append(data)
        elif not transport.is_closing():
            transport.write(data)
        self._current = None
        if self._waiting or self._eof or self._part:
            self._go_on()
        elif self.tick != self.server.tick:
            self.server.await_request(self)

    def _go_on(self) -> None:
        """Begin with the next request, or wait for one."""
        if self._waiting:
            if not self._pauses & _WRITE:
                self._start(self._waiting.popleft())
            if len(self._waiting) < MAX_WAITING:
                self._resume(_LINE)
        elif self._eof:
            self.finish()
        elif self._part == HEAD:
            self.server.await_head(self)
        else:
            self.server.await_request(self)

    def send(self, data: bytes) -> None:
        """Write at the end of this turn of the loop, together with what else is written then."""
        if self._transport is None:
            return
        self._out.append(data)
        if len(self._out) == 1:
            self.server.written(self)

    def flush(self) -> None:
        """Write what was gathered, and end the connection where it is to end."""
        out, self._out = self._out, []
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if out:
            transport.write(out[0] if len(out) == 1 else b"".join(out))
        if not self._ends:
            return
        if self._eof or not self._lingers:
            transport.close()
            return
        # The client may still be sending: closed at once, the kernel would answer that with a reset, and the answer be lost.
        if transport.can_write_eof():
            transport.write_eof()
        self.server.linger(self)

    def finish(self) -> None:
        """End the connection when what was gathered is written; what waits in line is not answered."""
        self.closing = self._stopped = self._ends = True
        self._waiting.clear()
        if self._pauses:
            self._resume(self._pauses)
        if not self._out:
            self._out.append(b"")
            self.server.written(self)

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self._current is not None

    def shut_down(self) -> None:
        """End the connection as soon as nothing is being answered on it."""
        if self._current is None and not self._waiting:
            self.finish()
        else:
            self.closing = True

    def time_out(self) -> None:
        """The head did not arrive in time: say so where one had begun."""
        if self._part == HEAD:
            self.refuse(RequestTooSlow(f"the headers did not arrive within {self.server.header_timeout_s:g} s"))
        else:
            self.finish()

    def close(self) -> None:
        """End the connection, on which nothing is being answered, at once."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def hold_body(self) -> None:
        """Pause reading until the buffered body is consumed."""
        self._pause(_BODY)

    def release_body(self) -> None:
        """It was consumed."""
        self._resume(_BODY)

    def refuse(self, error: TidegateError) -> None:
        """Answer what came last with an error, in its turn, and end the connection: where another request begins is unknown."""
        self._stopped = self._lingers = True
        exchange = self._receiving
        if exchange is not None and not exchange.answered:
            exchange.refusal = error
            if exchange is self._current:
                if exchange.task is not None:
                    exchange.task.cancel()
                exchange.refuse(error)
            return
        if exchange is not None:
            return
        refused = Exchange(self, "GET", "", RequestHeaders({}, {}, 0), False, "1.1")
        refused.refusal = error
        self.enqueue(refused)

    def _pause(self, reason: int) -> None:
        if not self._pauses and self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
        self._pauses |= reason

    def _resume(self, reason: int) -> None:
        if not self._pauses & reason:
            return
        self._pauses &= ~reason
        if not self._pauses and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
