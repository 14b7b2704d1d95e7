"""HTTP/1.1 on one connection: bytes in, exchanges out, answers in the order of their requests.

llhttp (through httptools, strict) reads the syntax. What two programs could read differently is refused with 400 and the
connection closed: Content-Length beside Transfer-Encoding, two Content-Lengths, folded lines, bare line feeds, NUL, any transfer
coding but `chunked`.

One exchange of a connection is answered at a time; the ones behind it wait in the order they came. The connection is not read
while many wait, while a body is not consumed, and while the client does not take its answers.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Final, cast

import httptools

from tidegate.decision import USUAL_METHODS
from tidegate.doors.client_address import peer_address
from tidegate.doors.http_exchange import Exchange, RequestHeaders
from tidegate.doors.peer_names import peer_names
from tidegate.doors.refusals import HeadersTooLarge, RequestTooSlow, TooManyConnections
from tidegate.errors import BadRequest, TidegateError
from tidegate.listen_address import join_address

if TYPE_CHECKING:
    from tidegate.doors.http_server import HttpServer

MAX_HEAD_BYTES: Final = 64 * 1024
"""Most bytes of a request line and its headers; the data plane's own, smaller limit answers first for what is decided."""
MAX_HEADERS: Final = 256
MAX_CHUNK_OVERHEAD: Final = 64 * 1024
"""Most bytes of chunk sizes, extensions and trailers around one body."""
MAX_WAITING: Final = 32
"""So many pipelined requests may wait behind the one being answered before the connection is not read."""
MAX_LINGER_BYTES: Final = 1024 * 1024
"""So much of a refused request is read and discarded, so that the client can read the answer before the connection ends."""

_VERSIONS: Final = ("1.1", "1.0")
_METHODS: Final = {method.encode(): method for method in USUAL_METHODS}
_MESSAGE_HEADERS: Final = frozenset((b"expect", b"transfer-encoding", b"upgrade"))
"""They say how a message is sent."""
_WRITE: Final = 1
_LINE: Final = 2
_BODY: Final = 4
"""Why a connection is not read: its client does not take the answers, many requests wait, a body is not consumed."""


class Connection(asyncio.Protocol):
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
        restricted: whether it came above the limit of connections, and is answered for probes alone.
        table: the server's table that it waits in: for a head, for the next request, or to be closed; None while it is answered.
    """

    __slots__ = (
        "_began",
        "_chunk_bytes",
        "_current",
        "_ends",
        "_eof",
        "_extra",
        "_head_bytes",
        "_in_body",
        "_in_head",
        "_linger_bytes",
        "_lingers",
        "_out",
        "_overhead",
        "_parser",
        "_pauses",
        "_raw_left",
        "_receiving",
        "_repeated",
        "_stopped",
        "_target",
        "_transport",
        "_values",
        "_waiting",
        "client",
        "closing",
        "lost",
        "peer",
        "peer_names",
        "restricted",
        "server",
        "table",
    )

    def __init__(self, server: HttpServer) -> None:
        self.server = server
        self.client = self.peer = ""
        self.peer_names: tuple[str, ...] = ()
        self.closing = self.lost = False
        self.restricted = False
        self.table: OrderedDict[Connection, float] | None = None
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._current: Exchange | None = None
        self._receiving: Exchange | None = None
        self._waiting: deque[Exchange] = deque()
        self._out: list[bytes] = []
        self._values: dict[bytes, bytes] = {}
        self._repeated: dict[bytes, list[bytes]] = {}
        self._extra = 0
        self._target = b""
        self._raw_left = 0
        self._chunk_bytes = self._head_bytes = self._overhead = self._linger_bytes = 0
        self._in_head = self._in_body = self._began = False
        self._stopped = False  # no more of what arrives is parsed
        self._eof = False
        self._lingers = False  # the client may still be sending when the connection ends
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
        if current is not None and not current.complete and current.task is not None:
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
        self._began = False
        self._chunk_bytes = len(data)
        self._feed(data)
        if self._stopped:
            return
        if not self._in_body:
            # Of a message that began within these bytes it is not known how many are its own: they are fewer than one read.
            self._head_bytes = 0 if self._began else self._head_bytes + len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(HeadersTooLarge(f"the headers have more than {MAX_HEAD_BYTES} bytes: none of a check needs so many"))
                return
            if self._current is None:
                self.server.await_head(self)
        elif not self._began:
            self._overhead += len(data)
            if self._overhead > MAX_CHUNK_OVERHEAD:
                self._refuse(
                    BadRequest("the chunked body has more chunk sizes, extensions and trailers than data: send larger chunks")
                )

    def eof_received(self) -> bool:
        """The client sends no more; it is still answered what it asked."""
        self._eof = True
        partial = self._receiving is not None or self._in_head
        return not partial and (self._current is not None or bool(self._waiting))

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

    # -- the parser ---------------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request line begins."""
        self._began = self._in_head = True
        self._head_bytes = self._overhead = 0

    def on_url(self, url: bytes) -> None:
        """The request's target, or a piece of it."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; those behind the body (trailers) are not taken."""
        if self._in_body:
            return
        name = name.lower()
        values = self._values
        if name not in values:
            if len(values) < MAX_HEADERS:
                values[name] = value
                return
        elif self._extra < MAX_HEADERS:
            self._repeated.setdefault(name, [values[name]]).append(value)
        self._extra += 1

    def on_headers_complete(self) -> None:
        """The head is whole: the request is put in line, though its body may still be on the way."""
        self._in_head, self._in_body = False, True
        if self._stopped:
            return  # it came in one piece with a request that ended the connection
        parser = self._parser
        target, values, repeated, extra = self._target, self._values, self._repeated, self._extra
        self._target, self._values = b"", {}
        if extra:
            self._repeated, self._extra = {}, 0
        sent_method = parser.get_method()
        method = _METHODS.get(sent_method)
        keep_alive = parser.should_keep_alive()
        # HTTP/1.0 goes on only where it says so. To make the text of the version costs as much as all else here.
        version = "1.1" if keep_alive and b"connection" not in values else parser.get_http_version()
        exchange = Exchange(
            self,
            sent_method.decode("latin-1") if method is None else method,
            target.decode("latin-1"),
            RequestHeaders(values, repeated),
            keep_alive,
            version,
        )
        if (
            method is not None
            and not extra
            and keep_alive
            and version == "1.1"
            and b"host" in values
            and _MESSAGE_HEADERS.isdisjoint(values)
        ):
            exchange.plain = True
            exchange.head_bytes = self._chunk_bytes if self._began else self._chunk_bytes + self._head_bytes
        else:
            if b"expect" in values and values[b"expect"].lower() == b"100-continue" and version == "1.1":
                exchange.expects_continue = True
            exchange.refusal = _fault_of(exchange, parser, repeated, len(values) + extra)
            if exchange.refusal is not None:
                self._stopped = self._lingers = True
        self._receiving = exchange
        self._enqueue(exchange)

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._overhead -= len(body)
        if self._receiving is not None and not self._stopped:
            self._receiving.add(body)

    def on_message_complete(self) -> None:
        """The request is whole, unless its body is still to come behind an offer to upgrade, which llhttp does not read."""
        exchange = self._receiving
        if exchange is not None and exchange.plain:
            self._in_body, self._began = False, True
            exchange.complete = True
            self._receiving = None
            return
        if exchange is not None and self._parser.should_upgrade() and exchange.refusal is None:
            length = exchange.headers.get("content-length")
            if length is not None and int(length):
                self._raw_left = int(length)
                return
        self._message_ended()

    def _message_ended(self) -> None:
        self._in_body, self._began = False, True
        if self._receiving is not None:
            self._receiving.end()
            if not self._receiving.keep_alive:
                self._stopped = True  # what follows a request to close is not read as a request
            self._receiving = None

    def _feed(self, data: bytes) -> None:
        while data and not self._stopped:
            if self._raw_left:
                piece, data = data[: self._raw_left], data[self._raw_left :]
                self._raw_left -= len(piece)
                self.on_body(piece)
                if not self._raw_left:
                    self._message_ended()
                continue
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                # HTTP/2 and the like are offered, never taken (RFC 9110, 7.8): the rest is HTTP/1.1.
                data = data[upgrade.args[0] :]
                self._parser = httptools.HttpRequestParser(self)
                continue
            except httptools.HttpParserError as error:
                if not self._stopped:
                    self._refuse(BadRequest(f"the request is not valid HTTP/1.1: {error}"))
            return

    # -- the line -----------------------------------------------------------------------------------------------------------

    def _enqueue(self, exchange: Exchange) -> None:
        if self._current is None and not self._pauses & _WRITE:
            self._start(exchange)
            return
        self._waiting.append(exchange)
        if len(self._waiting) >= MAX_WAITING:
            self._pause(_LINE)

    def _start(self, exchange: Exchange) -> None:
        self._current = exchange
        if self.table is not None:
            self.table.pop(self, None)
            self.table = None
        if exchange.plain and not self.restricted:
            self.server.decide(exchange)
            return
        refusal = exchange.refusal
        if refusal is None and self.restricted and exchange.path not in self.server.probes:
            refusal = TooManyConnections(
                "too many connections are open, and every one is in use: retry, or raise server.max_connections"
            )
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

    def answer_plain(self, exchange: Exchange, data: bytes) -> None:
        """As `answer`, for a connection that goes on; the event loop writes at the end of its turn.

        Args:
            exchange: whose answer it is.
            data: the whole answer.
        """
        transport = self._transport
        if exchange is not self._current or transport is None:
            return  # given up: the connection is gone
        if self._out:
            self._out.append(data)
        elif not transport.is_closing():
            transport.write(data)
        self._current = None
        if self._waiting or self._eof or self._in_head:
            self._go_on()
        else:
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
        elif self._in_head:
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

    def shut_down(self) -> None:
        """End the connection as soon as nothing is being answered on it."""
        if self._current is None and not self._waiting:
            self.finish()
        else:
            self.closing = True

    def time_out(self) -> None:
        """The head did not arrive in time: say so where one had begun."""
        if self._in_head:
            self._refuse(RequestTooSlow(f"the headers did not arrive within {self.server.header_timeout_s:g} s"))
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
        """Read no more until the body that is held is consumed."""
        self._pause(_BODY)

    def release_body(self) -> None:
        """It was consumed."""
        self._resume(_BODY)

    def _refuse(self, error: TidegateError) -> None:
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
        self._enqueue(refused)

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


def _fault_of(
    exchange: Exchange, parser: httptools.HttpRequestParser, repeated: dict[bytes, list[bytes]], received: int
) -> TidegateError | None:
    """What llhttp lets pass and the data plane does not."""
    values = exchange.headers.values
    if received > MAX_HEADERS:
        return HeadersTooLarge(f"the request has more than {MAX_HEADERS} headers: none of a check needs so many")
    if exchange.version not in _VERSIONS:
        return BadRequest(f"HTTP/{exchange.version} is not supported: use HTTP/1.1")
    coding = values.get(b"transfer-encoding")
    if coding is not None and (coding.lower() != b"chunked" or exchange.version == "1.0"):
        return BadRequest("the transfer coding is not supported: send Content-Length, or 'Transfer-Encoding: chunked'")
    if b"host" in repeated or (b"host" not in values and exchange.version == "1.1"):
        return BadRequest("the request has no Host header, or several: send one (RFC 9112, 3.2)")
    if exchange.method == "CONNECT":
        return BadRequest("CONNECT is not supported: this is not a proxy")
    if coding is not None and parser.should_upgrade():
        return BadRequest("an upgrade cannot be offered with a chunked body: send Content-Length")
    return None
