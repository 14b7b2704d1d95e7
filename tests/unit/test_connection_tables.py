"""Which connection an HTTP server closes, where plain requests leave their connection in its table of time-outs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tidegate.doors.http_connection import Connection
from tidegate.doors.http_exchange import PlainRequest
from tidegate.doors.http_server import HttpServer

REQUEST = b"GET /quick HTTP/1.1\r\nHost: a\r\n\r\n"
ANSWER = b"HTTP/1.1 204 No Content\r\n\r\n"


class Transport(asyncio.Transport):
    """Keeps what is written, and whether it was closed."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1)})
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def can_write_eof(self) -> bool:
        return False

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True


class Quick:
    """Answers every plain request at once."""

    def answer_now(self, request: PlainRequest) -> None:
        request.connection.answer_plain(request, ANSWER)


class Side:
    """A server without a socket, and a clock that the test sets."""

    def __init__(self, **options: Any) -> None:
        self.now = 1000.0
        self.server = HttpServer(Quick(), **options)
        self.server._loop = asyncio.get_running_loop()
        self.server.now = lambda: self.now

    def connect(self) -> tuple[Connection, Transport]:
        connection, transport = Connection(self.server), Transport()
        connection.connection_made(transport)
        return connection, transport

    def tick(self) -> None:
        if self.server._ticking is not None:
            self.server._ticking.cancel()
        self.server._tick()


@pytest.fixture
async def side() -> AsyncIterator[Side]:
    made = Side(idle_timeout_s=75.0, max_connections=2)
    made.tick()
    yield made
    assert made.server._ticking is not None
    made.server._ticking.cancel()


async def _ask(connection: Connection) -> None:
    connection.data_received(REQUEST)
    await asyncio.sleep(0)


async def test_a_connection_in_use_does_not_make_room(side: Side) -> None:
    older, older_transport = side.connect()
    younger, younger_transport = side.connect()
    for connection in (older, younger):
        await _ask(connection)
    side.now += 10
    side.tick()
    for _ in range(2):
        await _ask(older)
    side.connect()
    assert (older_transport.closed, younger_transport.closed) == (False, True), "the one that waited longest"
    assert older_transport.written == 3 * ANSWER


async def test_a_connection_in_use_is_not_idle(side: Side) -> None:
    used, used_transport = side.connect()
    idle, idle_transport = side.connect()
    await _ask(used)
    await _ask(idle)
    for _ in range(4):
        side.now += 25
        side.tick()
        await _ask(used)
    await asyncio.sleep(0)  # what ends is written first
    assert (used_transport.closed, idle_transport.closed) == (False, True)


async def test_a_request_that_has_just_arrived_is_neither_timed_out_nor_evicted(side: Side) -> None:
    connection, transport = side.connect()
    await _ask(connection)
    side.now += 1000
    connection.data_received(REQUEST)
    side.tick()
    side.connect()
    _, newest = side.connect()
    assert not transport.closed
    await asyncio.sleep(0)
    assert transport.written == 2 * ANSWER
    assert not newest.closed


async def test_trailers_are_no_headers_of_any_request(side: Side) -> None:
    connection, _ = side.connect()
    chunked = b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-API-Key: b\r\n\r\n"
    seen: list[Any] = []
    side.server.decide = seen.append  # type: ignore[method-assign]
    connection.data_received(chunked)
    assert b"x-api-key" not in seen[0].headers.values
    assert connection._values == {}


async def test_a_head_in_two_pieces_is_bounded_as_a_whole(side: Side) -> None:
    connection, _ = side.connect()
    seen: list[Any] = []
    side.server.decide = seen.append  # type: ignore[method-assign]
    head = b"GET /a HTTP/1.1\r\nHost: a\r\nX-Much: " + b"x" * 9000 + b"\r\n\r\n"
    connection.data_received(REQUEST + head[:9000])
    connection._current = None
    connection.data_received(head[9000:])
    assert type(seen[1]) is PlainRequest
    assert seen[1].head_bytes >= len(head)


async def test_requests_that_repeat_are_each_answered_once(side: Side) -> None:
    connection, transport = side.connect()
    other = b"GET /b HTTP/1.1\r\nHost: a\r\n\r\n"
    for read in (REQUEST, REQUEST, 2 * REQUEST, 2 * REQUEST, REQUEST + other[:9], other[9:], other[9:]):
        connection.data_received(read)
        for _ in range(2):
            await asyncio.sleep(0)
    assert transport.written.startswith(8 * ANSWER)
    assert transport.written.count(b"HTTP/1.1 ") == 9
    assert b" 400 " in transport.written[8 * len(ANSWER) :], "the end of a request is none, also where it came before"


async def test_requests_that_repeat_before_they_are_answered_wait_in_line(side: Side) -> None:
    connection, transport = side.connect()
    for _ in range(4):
        connection.data_received(REQUEST)
    for _ in range(4):
        await asyncio.sleep(0)
    assert transport.written == 4 * ANSWER


async def test_a_lost_connection_refers_to_no_request(side: Side) -> None:
    connection, transport = side.connect()
    connection.data_received(REQUEST)
    connection.connection_lost(None)
    await asyncio.sleep(0)
    assert connection._current is None
    assert transport.written == b""
    assert side.server.connections == 0
