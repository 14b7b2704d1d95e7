"""HTTP/1.1 of one connection: bytes in, exchanges out.

llhttp (through httptools, strict) reads the syntax. What two programs could read differently is refused with 400 and the
connection closed: Content-Length beside Transfer-Encoding, two Content-Lengths, folded lines, bare line feeds, NUL, any transfer
coding but `chunked`.
"""

from __future__ import annotations

from typing import Final

import httptools

from tidegate.decision import USUAL_METHODS
from tidegate.doors.head_layouts import MAX_LAYOUT_BYTES, HeadLayout, HeadLayouts
from tidegate.doors.http_exchange import Exchange, PlainRequest, RequestHeaders
from tidegate.doors.refusals import HeadersTooLarge
from tidegate.errors import BadRequest, TidegateError

MAX_HEAD_BYTES: Final = 64 * 1024
"""Most bytes of a request line and its headers; the data plane's own, smaller limit answers first for what is decided."""
MAX_HEADERS: Final = 256
MAX_CHUNK_OVERHEAD: Final = 64 * 1024
"""Most bytes of chunk sizes, extensions and trailers around one body."""
MAX_REPEATED_BYTES: Final = 1024
"""Most bytes of a request that is compared with the next one: so many are kept for each connection."""

_VERSIONS: Final = ("1.1", "1.0")
_METHODS: Final = {method.encode(): method for method in USUAL_METHODS}
_MESSAGE_HEADERS: Final = frozenset((b"expect", b"transfer-encoding", b"upgrade"))
"""They say how a message is sent."""

_NONE_REPEATED: Final[dict[bytes, list[bytes]]] = {}


BETWEEN: Final = 0
HEAD: Final = 1
BODY: Final = 2
"""Which part of a message the next byte belongs to."""


class RequestParser:
    """Makes requests of bytes. A subclass does something with them.

    Args:
        layouts: by which heads are read where llhttp has read such a one before; None for none.
    """

    __slots__ = (
        "_began",
        "_body",
        "_chunk_bytes",
        "_earlier_bytes",
        "_extra",
        "_head_bytes",
        "_last",
        "_last_bytes",
        "_layout",
        "_layouts",
        "_learned",
        "_lingers",
        "_names",
        "_overhead",
        "_parser",
        "_part",
        "_plain",
        "_raw_left",
        "_receiving",
        "_repeated",
        "_stopped",
        "_target",
        "_values",
    )

    def __init__(self, layouts: HeadLayouts | None = None) -> None:
        self._layouts = layouts
        self._layout: HeadLayout | None = None  # of an earlier request, where the last read ended with a whole one
        self._names: tuple[bytes, ...] = ()  # of the headers of the last request that llhttp has read, if a layout may be of use
        self._learned = False  # whether the layout of a head with these names was looked for
        self._parser = httptools.HttpRequestParser(self)
        self._part = BETWEEN
        self._began = False  # whether a message began, or ended, within the bytes that are being parsed
        self._receiving: Exchange | None = None  # in line, but not whole
        self._values: dict[bytes, bytes] = {}
        self._repeated: dict[bytes, list[bytes]] = {}
        self._extra = 0
        self._target = b""
        self._body: bytes | None = None
        self._last: PlainRequest | None = None
        self._last_bytes = b""  # the whole of the last read, where `_last` was all of it
        self._plain = 0  # plain requests that began and ended within the bytes that are being parsed; 2 where there is another
        self._raw_left = 0
        self._chunk_bytes = self._overhead = 0
        self._head_bytes = self._earlier_bytes = 0  # of a head that is not whole: at least, and at most
        self._stopped = False  # no more of what arrives is parsed
        self._lingers = False  # the client may still be sending when the connection ends

    def enqueue(self, request: Exchange | PlainRequest) -> None:
        """Put a request in line, whose head has arrived."""
        raise NotImplementedError

    def enqueue_plain(self, request: PlainRequest) -> None:
        """Put a plain request in line."""
        raise NotImplementedError

    def repeat(self, request: PlainRequest) -> None:
        """Put a request in line whose bytes are those of this one, the last of the connection."""
        raise NotImplementedError

    def refuse(self, error: TidegateError) -> None:
        """Answer what came last with an error, and read no more."""
        raise NotImplementedError

    def parse(self, data: bytes) -> bool:
        """Parse what came, and bound what is not yet a whole request.

        Args:
            data: not empty.

        Returns:
            Whether it ended with a whole request.
        """
        if self._last is not None and data == self._last_bytes:
            # The state between two messages does not depend on those before. No request is read as another one: all bytes are
            # compared.
            self.repeat(self._last)
            return True
        size = len(data)
        layout = self._layout
        # `HeadLayout.read`, written out.
        if layout is not None and size <= MAX_LAYOUT_BYTES and (found := layout.match(data)) is not None:
            # llhttp would read the same request, and its state between two messages stays as it is.
            request = PlainRequest(self, "GET", layout.target, None, None, size, data, found.group(*layout.places))  # type: ignore[arg-type]
            if size <= MAX_REPEATED_BYTES:
                self._last, self._last_bytes = request, data
            else:
                self._last = None
            self.enqueue_plain(request)
            return True
        self._began = False
        self._plain = 0
        self._chunk_bytes = size
        if self._raw_left:
            self._feed(data)
        else:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                self._feed(self._rest(data, upgrade))
            except httptools.HttpParserError as error:
                self._refuse_syntax(error)
        if self._part == BETWEEN and self._began:
            if self._layouts is not None and self._plain == 1 and size <= MAX_LAYOUT_BYTES:
                self._learn(self._layouts, data)
            if self._plain == 1 and size <= MAX_REPEATED_BYTES:
                self._last_bytes = data
            else:
                self._last = None
            return True
        self._last = self._layout = None
        self._learned = False
        self._bound_part(size)
        return False

    def _learn(self, layouts: HeadLayouts, data: bytes) -> None:
        """Read further heads by the layout of this one, if the one before had the same headers."""
        last = self._last
        if last is None or last.target != layouts.target or last.method != "GET" or last.body is not None:
            return
        names = tuple(last.values)
        if names != self._names:
            self._names, self._learned = names, False
        elif not self._learned:
            # Once: it costs as much as reading such a head.
            self._learned = True
            self._layout = layouts.learn(data) or self._layout

    def _bound_part(self, size: int) -> None:
        """The bytes that came ended within a message."""
        if self._stopped:
            return
        if self._part == BODY:
            if self._receiving is None:
                self._open()
            self._values = {}  # trailers
            # Of a message that began within these bytes it is not known how many are its own: they are fewer than one read.
            self._overhead = 0 if self._began else self._overhead + size
            if self._overhead > MAX_CHUNK_OVERHEAD:
                self.refuse(
                    BadRequest("the chunked body has more chunk sizes, extensions and trailers than data: send larger chunks")
                )
            return
        self._head_bytes = 0 if self._began else self._head_bytes + size
        self._earlier_bytes = size if self._began else self._earlier_bytes + size
        if self._head_bytes > MAX_HEAD_BYTES:
            self.refuse(HeadersTooLarge(f"the headers have more than {MAX_HEAD_BYTES} bytes: none of a check needs so many"))
        elif len(self._values) > MAX_HEADERS:
            self.refuse(_too_many_headers())

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
                data = self._rest(data, upgrade)
                continue
            except httptools.HttpParserError as error:
                self._refuse_syntax(error)
            return

    def _rest(self, data: bytes, upgrade: httptools.HttpParserUpgrade) -> bytes:
        """What follows an offer to upgrade. HTTP/2 and the like are never taken (RFC 9110, 7.8): the rest is HTTP/1.1."""
        self._parser = httptools.HttpRequestParser(self)
        return data[upgrade.args[0] :]

    def _refuse_syntax(self, error: httptools.HttpParserError) -> None:
        if not self._stopped:
            self.refuse(BadRequest(f"the request is not valid HTTP/1.1: {error}"))

    # -- called by httptools ------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request line begins."""
        self._began = True
        self._part = HEAD

    def on_url(self, url: bytes) -> None:
        """The request's target, or a piece of it."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; those behind a body (trailers) are dropped when it ends."""
        name = name.lower()
        values = self._values
        if name in values:
            self._repeat(name, value)
        else:
            values[name] = value

    def _repeat(self, name: bytes, value: bytes) -> None:
        """A header that came before."""
        if self._part == HEAD:
            if self._extra < MAX_HEADERS:
                self._repeated.setdefault(name, [self._values[name]]).append(value)
            self._extra += 1

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._part = BODY
        if b"transfer-encoding" in self._values:
            self._open()  # before trailers come, which must not pass for headers

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._overhead -= len(body)
        if self._receiving is None:
            if self._body is None:
                self._body = body
                return
            self._open()
        if self._receiving is not None:
            self._receiving.add(body)

    def on_message_complete(self) -> None:
        """The request is whole, unless its body is still to come behind an offer to upgrade, which llhttp does not read."""
        values = self._values
        if (
            self._receiving is None
            and not self._extra
            and b"host" in values
            and _MESSAGE_HEADERS.isdisjoint(values)
            and len(values) <= MAX_HEADERS
            and not self._stopped
        ):
            parser = self._parser
            method = _METHODS.get(parser.get_method())
            # HTTP/1.0 goes on only where it says so. To make the text of the version costs as much as all else here.
            if (
                method is not None
                and parser.should_keep_alive()
                and (b"connection" not in values or parser.get_http_version() == "1.1")
            ):
                head_bytes = self._chunk_bytes
                if self._began:
                    self._plain += 1
                else:
                    # All that arrived since the read in which it began, and what else came in that one.
                    head_bytes += self._earlier_bytes
                    self._plain = 2
                request = PlainRequest(self, method, self._target, values, self._body, head_bytes)  # type: ignore[arg-type]
                self._last = request
                self._body = None
                self._target, self._values = b"", {}
                self._part, self._began = BETWEEN, True
                self.enqueue_plain(request)
                return
        if self._receiving is None:
            self._open()
        exchange = self._receiving
        if exchange is not None and self._parser.should_upgrade() and exchange.refusal is None:
            length = exchange.headers.get("content-length")
            if length is not None and int(length):
                self._raw_left = int(length)
                return
        self._message_ended()

    def _open(self) -> None:
        """Put a request in line that is not plain, or whose body is still on the way."""
        if self._stopped:
            return  # it came in one piece with a request that ended the connection
        self._plain = 2
        parser = self._parser
        target, values, repeated, extra = self._target, self._values, self._repeated, self._extra
        self._target, self._values = b"", {}
        if extra:
            self._repeated, self._extra = {}, 0
        else:
            repeated = _NONE_REPEATED  # not the parser's own: a pipelined request fills that before this one is answered
        sent_method = parser.get_method()
        exchange = Exchange(
            self,  # type: ignore[arg-type]  # what parses is a connection: there is no other subclass
            _METHODS.get(sent_method) or sent_method.decode("latin-1"),
            target.decode("latin-1"),
            RequestHeaders(values, repeated),
            parser.should_keep_alive(),
            parser.get_http_version(),
        )
        if b"expect" in values and values[b"expect"].lower() == b"100-continue" and exchange.version == "1.1":
            exchange.expects_continue = True
        exchange.refusal = _fault_of(exchange, parser, repeated, len(values) + extra)
        if exchange.refusal is not None:
            self._stopped = self._lingers = True
        self._receiving = exchange
        self.enqueue(exchange)
        body, self._body = self._body, None
        if body is not None and exchange.refusal is None:
            exchange.add(body)

    def _message_ended(self) -> None:
        self._part, self._began = BETWEEN, True
        self._values = {}  # trailers
        if self._receiving is not None:
            self._receiving.end()
            if not self._receiving.keep_alive:
                self._stopped = True  # what follows a request to close is not read as a request
            self._receiving = None


def _fault_of(
    exchange: Exchange, parser: httptools.HttpRequestParser, repeated: dict[bytes, list[bytes]], received: int
) -> TidegateError | None:
    """What llhttp lets pass and the data plane does not."""
    values = exchange.headers.values
    if received > MAX_HEADERS:
        return _too_many_headers()
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


def _too_many_headers() -> HeadersTooLarge:
    return HeadersTooLarge(f"the request has more than {MAX_HEADERS} headers: none of a check needs so many")
