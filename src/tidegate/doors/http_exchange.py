"""One HTTP request and its answer, as the data plane sees them: RSGI's scope and protocol in one object.

Header values are handed on as they came: text as UTF-8, other bytes as lone surrogates (`surrogateescape`), every occurrence.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import msgspec

from tidegate.doors.head_layouts import Facts, values_of
from tidegate.doors.responses import Headers, encode, error_body
from tidegate.errors import TidegateError

if TYPE_CHECKING:
    from tidegate.decision import Check
    from tidegate.doors.http_connection import Connection
    from tidegate.policy.attributes import CallerPolicy

logger = logging.getLogger(__name__)

MAX_BUFFERED_BODY_BYTES: Final = 256 * 1024
"""Maximum bytes of an unconsumed body that are buffered; above it the connection is not read."""

_BODILESS: Final = frozenset((204, 304))
PHRASES: Final = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}
_CLOSE: Final = ("connection", "close")
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class RequestHeaders:
    """The headers of a request, names in lower case. Values are text as UTF-8; a byte that is not UTF-8 is a lone surrogate.

    Args:
        values: the first value of each name.
        repeated: all values of the names that came more than once.
        size: bytes of all names and values; counted when needed where not given.
    """

    __slots__ = ("_repeated", "_size", "values")

    def __init__(self, values: dict[bytes, bytes], repeated: dict[bytes, list[bytes]], size: int | None = None) -> None:
        self.values = values
        self._repeated = repeated
        self._size = size

    @property
    def size(self) -> int:
        """Bytes of all names and values."""
        if self._size is None:
            self._size = sum(map(len, self.values)) + sum(map(len, self.values.values()))
            for name, values in self._repeated.items():
                self._size += len(name) * (len(values) - 1) + sum(map(len, values[1:]))
        return self._size

    def get(self, key: str, default: Any = None) -> Any:
        """The first value of a name, or the default."""
        value = self.values.get(key.encode())
        return default if value is None else value.decode("utf-8", "surrogateescape")

    def get_all(self, key: str) -> list[str]:
        """Every value of a name, in the order they came."""
        name = key.encode()
        if self._repeated and name in self._repeated:
            return [value.decode("utf-8", "surrogateescape") for value in self._repeated[name]]
        value = self.values.get(name)
        return [] if value is None else [value.decode("utf-8", "surrogateescape")]

    def items(self) -> list[tuple[str, str]]:
        """Every name with its values, each by itself; the values of one name are adjacent."""
        return [(name, value) for name in self.keys() for value in self.get_all(name)]

    def keys(self) -> list[str]:
        """The different names."""
        return [name.decode("latin-1") for name in self.values]

    def raw(self) -> list[tuple[bytes, bytes]]:
        """Every name with its values as they came, each by itself; the values of one name are adjacent."""
        return [(name, value) for name, first in self.values.items() for value in self._repeated.get(name, (first,))]

    def __contains__(self, key: str) -> bool:
        return key.encode() in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.values)


class PlainRequest(msgspec.Struct, eq=False, gc=False):
    """A request in the form that most have: HTTP/1.1, arrived whole, on a connection that goes on, no header came twice, and none
    says how the message is sent.

    It takes a tenth of the time of an `Exchange`, which is made of it only where it is not answered at once.

    Args:
        connection: that it came on.
        method: upper case, a usual one.
        target: of the request line.
        sent: its headers, names in lower case; None where `data` has them.
        body: None where it has none.
        head_bytes: at least as many as its head has.
        data: all its bytes, where a `HeadLayout` has read them.
        facts: what it has read.
        exchange: the same request, once it was made.
        repeats: whether the same bytes came on the connection before; then this is the same record too.
        check: of the request, where it repeats and its check depends on its bytes, its connection and `policy` alone.
        policy: what `check` was made by; None where it does not depend on one.
    """

    connection: Connection
    method: str
    target: bytes
    sent: dict[bytes, bytes] | None
    body: bytes | None
    head_bytes: int
    data: bytes = b""
    facts: Facts | None = None
    exchange: Exchange | None = None
    repeats: bool = False
    check: Check | None = None
    policy: CallerPolicy | None = None

    @property
    def values(self) -> dict[bytes, bytes]:
        """Its headers, names in lower case."""
        if self.sent is None:
            self.sent = values_of(self.data)
        return self.sent

    @property
    def headers(self) -> RequestHeaders:
        """The headers as other requests have them."""
        return RequestHeaders(self.values, {})

    def get(self, key: str) -> Any:
        """The value of a header; None where it did not come. Read only when needed."""
        return self.headers.get(key)

    def open(self) -> Exchange:
        """The same request as an exchange, in its place on the connection."""
        exchange = self.exchange
        if exchange is None:
            exchange = Exchange(self.connection, self.method, self.target.decode("latin-1"), self.headers, True, "1.1")
            exchange.complete = True
            self.exchange = exchange
            self.connection.replace(self, exchange)
            if self.body is not None:
                exchange.add(self.body)
        return exchange


class Exchange:
    """One request and its answer: what the data plane is given as RSGI's scope and protocol.

    Args:
        connection: that it came on.
        method: upper case.
        target: of the request line.
        headers: that came.
        keep_alive: whether the connection may go on after the answer.
        version: of HTTP, `1.1` or `1.0`.

    Attributes:
        complete: whether the whole request has arrived.
        answered: whether an answer was given.
    """

    proto = "http"
    complete = False
    answered = False
    expects_continue = False
    refusal: TidegateError | None = None
    task: asyncio.Task[None] | None = None
    _path: str | None = None
    _query_string = ""
    _chunks: Sequence[bytes] = ()
    _size = 0
    _waiter: asyncio.Future[None] | None = None

    def __init__(
        self, connection: Connection, method: str, target: str, headers: RequestHeaders, keep_alive: bool, version: str
    ) -> None:
        self.connection = connection
        self.method = method
        self.target = target
        self.headers = headers
        self.keep_alive = keep_alive
        self.version = version

    @property
    def client(self) -> str:
        """Address and port of the peer, `host:port`; empty where it has none."""
        return self.connection.client

    @property
    def peer_names(self) -> tuple[str, ...]:
        """Names in the certificate of the peer; empty without mutual TLS."""
        return self.connection.peer_names

    @property
    def path(self) -> str:
        """The target's path, one character for each byte that came."""
        return self._split_target() if self._path is None else self._path

    @property
    def query_string(self) -> str:
        """What the target has behind its path."""
        self._split_target()
        return self._query_string

    def _split_target(self) -> str:
        target = self.target
        if not target.startswith("/") and "://" in target:
            # Absolute form (RFC 9112, 3.2.2): the path begins behind the authority.
            rest = target.partition("://")[2]
            slash = rest.find("/")
            target = "/" if slash < 0 else rest[slash:]
        self._path, _, self._query_string = target.partition("?")
        return self._path

    def add(self, chunk: bytes) -> None:
        """Take a piece of the body; reading pauses while too much is buffered."""
        if isinstance(self._chunks, list):
            self._chunks.append(chunk)
        else:
            self._chunks = [chunk]
        self._size += len(chunk)
        if self._waiter is not None:
            self._wake()
        if self._size > MAX_BUFFERED_BODY_BYTES:
            self.connection.hold_body()

    def end(self) -> None:
        """The request is whole."""
        self.complete = True
        if self._waiter is not None:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _arrival(self) -> None:
        if self.expects_continue:
            self.expects_continue = False
            self.connection.send(_CONTINUE)
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _take(self) -> Sequence[bytes]:
        chunks, self._chunks, self._size = self._chunks, (), 0
        self.connection.release_body()
        return chunks

    async def __call__(self) -> bytes:
        """The whole body; the caller has bounded it by its Content-Length."""
        if self.complete:
            return b"".join(self._take())
        taken: list[bytes] = []
        while not self.complete:
            # Taken before it is waited for: while too much is buffered, nothing more arrives.
            taken += self._take()
            await self._arrival()
        return b"".join(taken + self._take())

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The body, piece by piece."""
        while True:
            for chunk in self._take():
                yield chunk
            if self.complete and not self._chunks:
                return
            if not self._chunks:
                await self._arrival()

    def response_bytes(self, status: int, headers: Headers, body: bytes) -> None:
        """Answer with a body; an answer to HEAD has its headers alone."""
        self._answer(status, headers, body)

    def response_empty(self, status: int, headers: Headers) -> None:
        """Answer without a body."""
        self._answer(status, headers, b"")

    def refuse(self, error: TidegateError) -> None:
        """Answer with an error in the error form, and close the connection."""
        self._answer(
            error.status,
            [("content-type", "application/json"), ("x-tidegate-error", error.code), _CLOSE],
            encode(error_body(error)),
        )

    def _answer(self, status: int, headers: Headers, body: bytes) -> None:
        if self.answered:
            raise RuntimeError("this request was answered already")
        # What is left of a request that was answered early would be read as the next one.
        closes = not self.keep_alive or not self.complete or _CLOSE in headers or self.connection.closing
        lines = [f"{name}: {value}\r\n" for name, value in headers]
        if status not in _BODILESS:
            lines.append(f"content-length: {len(body)}\r\n")
        if closes:
            if _CLOSE not in headers:
                lines.append("connection: close\r\n")
        elif self.version == "1.0":
            lines.append("connection: keep-alive\r\n")
        head = PHRASES[status] + self.connection.server.date_line + "".join(lines)
        if head.count("\n") != len(lines) + 2:
            # A line break inside a value would let whoever wrote it write headers.
            logger.error("an answer's header has a line break: %r", headers)
            raise ValueError("a header value has a line break")
        self.answered = True
        self.connection.answer(self, f"{head}\r\n".encode() + (b"" if self.method == "HEAD" else body), closes)
