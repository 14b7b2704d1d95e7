"""The HTTP server of the data plane: what it refuses as ambiguous, what it accepts, and its bounds."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases.doors import FREE, POLICY
from tests.conftest import Serve
from tests.moments import PATIENCE_S, until
from tests.raw_http import exchange
from tests.servers.ports import HOST
from tidegate.doors.http import DataPlane, Response
from tidegate.doors.http_connection import MAX_HEAD_BYTES, MAX_HEADERS, MAX_WAITING
from tidegate.doors.http_exchange import MAX_BUFFERED_BODY_BYTES, Exchange
from tidegate.doors.http_server import RESERVED, HttpServer
from tidegate.gate.gate import Gate
from tidegate.time_slice import SLICE_NS

KEY = f"X-API-Key: {FREE}\r\nX-Original-URI: /api/v1/a\r\n".encode()
CHECK = b'{"path":"/api/v1/a","api_key":"%s","cost":0}' % FREE.encode()


def head(line: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join([line, b"Host: x", *headers, b"", b""])


POST = b"POST /v1/check HTTP/1.1"
GET = b"GET /v1/authorize HTTP/1.1"

AMBIGUOUS: dict[str, bytes] = {
    "Content-Length and Transfer-Encoding": head(POST, b"Content-Length: 3", b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "Transfer-Encoding and Content-Length": head(POST, b"Transfer-Encoding: chunked", b"Content-Length: 3") + b"0\r\n\r\n",
    "two equal Content-Lengths": head(POST, b"Content-Length: 2", b"Content-Length: 2") + b"{}",
    "two different Content-Lengths": head(POST, b"Content-Length: 2", b"Content-Length: 3") + b"{}",
    "a list of Content-Lengths": head(POST, b"Content-Length: 2, 2") + b"{}",
    "a signed Content-Length": head(POST, b"Content-Length: +2") + b"{}",
    "a hexadecimal Content-Length": head(POST, b"Content-Length: 0x2") + b"{}",
    "an overflowing Content-Length": head(POST, b"Content-Length: 99999999999999999999999") + b"{}",
    "a folded header": head(GET, b"X-A: b", b" c"),
    "bare line feeds": GET + b"\nHost: x\n\n",
    "a bare line feed in the headers": GET + b"\r\nHost: x\nX-A: b\r\n\r\n",
    "a bare carriage return": head(GET, b"X-A: b\rX-B: c"),
    "NUL in a value": head(GET, b"X-A: b\0c"),
    "a space before the colon": head(GET, b"X-A : b"),
    "an empty header name": head(GET, b": b"),
    "another transfer coding": head(POST, b"Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n",
    "chunked that is not last": head(POST, b"Transfer-Encoding: chunked, identity") + b"0\r\n\r\n",
    "an unknown transfer coding": head(POST, b"Transfer-Encoding: xchunked") + b"0\r\n\r\n",
    "two Transfer-Encodings": head(POST, b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity") + b"0\r\n\r\n",
    "Transfer-Encoding in HTTP/1.0": head(b"POST /v1/check HTTP/1.0", b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "a chunk size with a line feed": head(POST, b"Transfer-Encoding: chunked") + b"2\n{}\r\n0\r\n\r\n",
    "a negative chunk size": head(POST, b"Transfer-Encoding: chunked") + b"-2\r\n{}\r\n0\r\n\r\n",
    "an overflowing chunk size": head(POST, b"Transfer-Encoding: chunked") + b"fffffffffffffffff2\r\n{}\r\n0\r\n\r\n",
    "two Hosts": head(GET, b"Host: y"),
    "no Host": GET + b"\r\n\r\n",
    "HTTP/2.0": head(b"GET /v1/authorize HTTP/2.0"),
    "HTTP/0.9": b"GET /v1/authorize\r\n\r\n",
    "HTTP/1.2": head(b"GET /v1/authorize HTTP/1.2"),
    "a method in lower case": head(b"get /v1/authorize HTTP/1.1"),
    "CONNECT": head(b"CONNECT a.example:443 HTTP/1.1"),
    "bytes of TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64,
    "a target with a tab": head(b"GET /v1/auth\torize HTTP/1.1"),
    "an upgrade with a chunked body": head(POST, b"Connection: Upgrade", b"Upgrade: h2c", b"Transfer-Encoding: chunked")
    + b"0\r\n\r\n",
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """One process for the tables, on uvloop as in production."""
    directory = tmp_path_factory.mktemp("served")
    (directory / "tidegate.policy.toml").write_text(POLICY)
    server = Serve(directory, log=directory / "log")
    server.wait_ready()
    yield server
    server.stop()


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_two_programs_read_differently_is_rejected(served: Serve, name: str) -> None:
    # Were it taken apart differently, the request behind it would be answered as well.
    behind = head(GET, *KEY.split(b"\r\n")[:2], b"Connection: close")
    answers = exchange(served.port, AMBIGUOUS[name] + behind)
    assert [answer.status for answer in answers] == [400]
    assert answers[0].json()["error"]["code"] == "BAD_REQUEST"
    assert answers[0].headers["connection"] == "close"
    peek = head(POST, b"Connection: close", b"Content-Length: %d" % len(CHECK)) + CHECK
    decision = exchange(served.port, peek, "POST")[0].json()
    assert decision["remaining"] == decision["limit"], "the request behind it was not decided either"


ACCEPTED: dict[str, tuple[bytes, list[int]]] = {
    "absolute form": (head(b"GET http://x/readyz?a=b HTTP/1.1", b"Connection: close"), [200]),
    "HTTP/1.0": (b"GET /readyz HTTP/1.0\r\n\r\n", [200]),
    "HTTP/1.0 that keeps the connection": (
        b"GET /readyz HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /readyz HTTP/1.0\r\n\r\n",
        [200, 200],
    ),
    "empty lines before a request": (b"\r\n\r\n" + head(b"GET /readyz HTTP/1.1", b"Connection: close"), [200]),
    "requests behind each other": (
        head(b"GET /readyz HTTP/1.1") + head(b"GET /nothing HTTP/1.1") + head(GET, b"Connection: close"),
        [200, 404, 400],
    ),
    "a chunked body with an extension and a trailer": (
        head(POST, b"Transfer-Encoding: chunked", b"Connection: close")
        + b"%x;a=b\r\n%s\r\n0\r\nX-API-Key: not-this-one\r\n\r\n" % (len(CHECK), CHECK),
        [200],
    ),
    "what follows a request to close is not a request": (
        head(b"GET /readyz HTTP/1.1", b"Connection: close") + head(b"GET /readyz HTTP/1.1"),
        [200],
    ),
    "an offer of HTTP/2, with a body, and a request behind it": (
        head(
            POST,
            b"Connection: Upgrade, HTTP2-Settings",
            b"Upgrade: h2c",
            b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA",
            b"Content-Length: %d" % len(CHECK),
        )
        + CHECK
        + head(b"GET /readyz HTTP/1.1", b"Connection: close"),
        [200, 200],
    ),
    "an offer of HTTP/2 without a body": (
        head(b"GET /readyz HTTP/1.1", b"Connection: Upgrade", b"Upgrade: h2c")
        + head(b"GET /readyz HTTP/1.1", b"Connection: close"),
        [200, 200],
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_valid_is_answered_in_order(served: Serve, name: str) -> None:
    sent, statuses = ACCEPTED[name]
    assert [answer.status for answer in exchange(served.port, sent)] == statuses


def test_a_client_that_expects_100_is_requested_its_body(served: Serve) -> None:
    with socket.create_connection((HOST, served.port), 20) as connection:
        connection.sendall(head(POST, b"Expect: 100-continue", b"Connection: close", b"Content-Length: %d" % len(CHECK)))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(CHECK)
        assert connection.recv(100).startswith(b"HTTP/1.1 200 OK\r\n")


def test_an_answer_that_comes_before_the_body_can_be_read(served: Serve) -> None:
    """The client is still sending when it is refused: the connection ends only after it has had time to read why."""
    body = b" " * 900_000
    answers = exchange(served.port, head(b"POST /nothing HTTP/1.1", b"Content-Length: %d" % len(body)) + body)
    assert [(answer.status, answer.headers["connection"]) for answer in answers] == [(404, "close")]


@pytest.mark.parametrize(
    "sent",
    [
        head(GET, b"X-A: " + b"a" * (4 * MAX_HEAD_BYTES)),
        head(GET, *[b"A: b"] * (MAX_HEADERS + 1)),
        b"GET /" + b"a" * (4 * MAX_HEAD_BYTES),
    ],
    ids=["long value", "many headers", "endless target"],
)
def test_heads_are_bounded(served: Serve, sent: bytes) -> None:
    assert [answer.status for answer in exchange(served.port, sent)] == [431]


def test_chunk_extensions_are_bounded(served: Serve) -> None:
    sent = head(POST, b"Transfer-Encoding: chunked") + b"1;" + b"a" * 800_000
    assert [answer.status for answer in exchange(served.port, sent)] == [400]


class Held:
    """An app that answers each request when it is released, with what it asked."""

    def __init__(self) -> None:
        self.started = 0
        self.release = asyncio.Event()

    async def __rsgi__(self, scope: Exchange, proto: Exchange) -> None:
        self.started += 1
        if scope.path not in ("/readyz", "/quick"):
            await self.release.wait()
        proto.response_bytes(200, [], b"%s %s" % (scope.path.encode(), await proto()))


@contextlib.asynccontextmanager
async def listening(app: Any, **options: Any) -> AsyncIterator[tuple[HttpServer, int]]:
    server = HttpServer(app, **options)
    bound = socket.socket()
    bound.bind((HOST, 0))
    bound.setblocking(False)
    await server.start(bound)
    try:
        yield server, bound.getsockname()[1]
    finally:
        await server.stop(0.05)


async def ask(port: int, path: str, keep: bool = False) -> bytes:
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(head(f"GET {path} HTTP/1.1".encode(), *([] if keep else [b"Connection: close"])))
    try:
        return await asyncio.wait_for(reader.read(), PATIENCE_S)
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_idle_connections_make_room_for_new_ones() -> None:
    async with listening(Held(), max_connections=20) as (server, port):
        idle = [await asyncio.open_connection(HOST, port) for _ in range(60)]
        await until(lambda: server.evicted >= 40)
        assert server.connections <= 20
        assert (await ask(port, "/readyz")).endswith(b"/readyz ")
        # The oldest went, the youngest are served.
        assert await asyncio.wait_for(idle[0][0].read(), PATIENCE_S) == b""
        idle[-1][1].write(head(b"GET /quick HTTP/1.1"))
        assert (await idle[-1][0].readline()) == b"HTTP/1.1 200 OK\r\n"
        for _, writer in idle:
            writer.close()


async def test_where_all_connections_are_in_use_probes_are_answered() -> None:
    app = Held()
    async with listening(app, max_connections=5) as (server, port):
        busy = [asyncio.create_task(ask(port, "/slow")) for _ in range(5)]
        await until(lambda: app.started == 5)
        assert (await ask(port, "/readyz")).endswith(b"/readyz ")
        refused = await ask(port, "/v1/authorize")
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"TOO_MANY_CONNECTIONS" in refused
        assert app.started == 6, "what is refused does not reach the app"
        app.release.set()
        assert all(answer.endswith(b"/slow ") for answer in await asyncio.gather(*busy))
        assert server.refused == 0


async def test_the_reserve_for_probes_is_bounded() -> None:
    app = Held()
    async with listening(app, max_connections=1) as (server, port):
        busy = asyncio.create_task(ask(port, "/slow"))
        await until(lambda: app.started == 1)
        more = [await asyncio.open_connection(HOST, port) for _ in range(RESERVED + 30)]
        # Those that wait make room for each other; never are more open than the limit and the reserve.
        await until(lambda: server.evicted > 0)
        assert server.connections <= 1 + RESERVED
        app.release.set()
        assert (await busy).endswith(b"/slow ")
        for _, writer in more:
            writer.close()


async def test_a_client_that_takes_no_answers_is_not_read_and_then_cut() -> None:
    class Large:
        answered = 0

        async def __rsgi__(self, scope: Exchange, proto: Exchange) -> None:
            Large.answered += 1
            proto.response_bytes(200, [], b"x" * 100_000)

    async with listening(Large(), write_timeout_s=0.2) as (server, port):
        with socket.create_connection((HOST, port)) as deaf:
            deaf.setblocking(False)
            sent = 0
            with contextlib.suppress(BlockingIOError):
                while sent < 4_000_000:
                    sent += deaf.send(head(b"GET /quick HTTP/1.1") * 100)
            await until(lambda: server.connections == 0 and Large.answered > 0)
        # What fits into the kernel's buffers, and one line of requests; not the tens of thousands that came.
        assert Large.answered < 1000


async def test_a_line_of_requests_is_bounded_and_answered_in_order() -> None:
    app = Held()
    async with listening(app) as (_, port):
        reader, writer = await asyncio.open_connection(HOST, port)
        many = 4 * MAX_WAITING
        writer.write(b"".join(head(b"GET /%d HTTP/1.1" % number) for number in range(many)))
        await until(lambda: app.started == 1)
        app.release.set()
        received = b""
        while received.count(b"HTTP/1.1 200") < many or not received.endswith(b"/%d " % (many - 1)):
            received += await asyncio.wait_for(reader.read(65_536), PATIENCE_S)
        bodies = [int(each.rpartition(b"/")[2]) for each in received.split(b"HTTP/1.1 200 OK")[1:]]
        assert bodies == list(range(many))
        writer.close()


async def test_a_stop_finishes_what_is_being_answered_and_accepts_no_more() -> None:
    app = Held()
    async with listening(app) as (server, port):
        idle_reader, idle_writer = await asyncio.open_connection(HOST, port)
        busy = asyncio.create_task(ask(port, "/slow", keep=True))
        await until(lambda: app.started == 1)
        stopping = asyncio.create_task(server.stop(30))
        assert await asyncio.wait_for(idle_reader.read(), PATIENCE_S) == b"", "an idle connection is closed at once"
        with pytest.raises(OSError, match="Connect call failed"):
            await asyncio.open_connection(HOST, port)
        app.release.set()
        answer = await busy
        assert b"connection: close\r\n" in answer
        assert answer.endswith(b"/slow ")
        await stopping
        idle_writer.close()


async def test_a_stop_answers_the_connections_that_wait_to_be_accepted() -> None:
    async with listening(Held()) as (server, port):
        # The event loop does not run in between: the kernel has the connections and requests, the server knows of none.
        clients = [socket.create_connection((HOST, port)) for _ in range(50)]
        for client in clients[:-1]:
            client.sendall(head(b"GET /quick HTTP/1.1"))
        assert server.connections == 0
        await server.stop(30)
        for client in clients[:-1]:
            with client, client.makefile("rb") as file:
                answer = file.read()
                assert b"connection: close\r\n" in answer
                assert answer.endswith(b"/quick ")
        with clients[-1] as silent:
            assert silent.recv(1) == b"", "a connection without a request is closed after a moment"


async def test_idle_connections_end_after_a_while() -> None:
    async with listening(Held(), idle_timeout_s=0.05, header_timeout_s=0.2) as (server, port):
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(head(b"GET /quick HTTP/1.1"))
        assert (await asyncio.wait_for(reader.read(), PATIENCE_S)).endswith(b"/quick ")
        await until(lambda: server.connections == 0)
        writer.close()


async def test_a_client_that_leaves_is_cancelled_before_its_body_is_whole(gate: Gate) -> None:
    plane = DataPlane(gate, {})
    async with listening(plane) as (server, port):
        _, writer = await asyncio.open_connection(HOST, port)
        writer.write(head(POST, b"Content-Length: 50") + b"{")
        await until(lambda: plane.in_flight == 1)
        writer.close()
        await until(lambda: plane.in_flight == 0 and server.connections == 0)


async def test_many_slow_requests_at_once_do_not_hold_the_event_loop() -> None:
    turns = 0
    seen: list[int] = []

    def turn() -> None:
        nonlocal turns
        turns += 1
        loop.call_soon(turn)

    class Slow:
        async def __rsgi__(self, scope: Exchange, proto: Exchange) -> None:
            ends = time.perf_counter_ns() + 2 * SLICE_NS
            while time.perf_counter_ns() < ends:
                pass
            seen.append(turns)
            proto.response_empty(204, [])

    loop = asyncio.get_running_loop()
    async with listening(Slow()) as (_, port):
        pairs = [await asyncio.open_connection(HOST, port) for _ in range(12)]
        for _, writer in pairs:
            writer.write(head(b"GET /a HTTP/1.1"))
        loop.call_soon(turn)
        for reader, writer in pairs:
            assert await reader.readline() == b"HTTP/1.1 204 No Content\r\n"
            writer.close()
    assert len(set(seen)) == 12, "the loop turned between any two of them"


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_larger_than_what_is_held_arrives_whole(chunked: bool) -> None:
    class Late:
        async def __rsgi__(self, scope: Exchange, proto: Exchange) -> None:
            await asyncio.sleep(0.05)  # meanwhile more arrives than is held
            body = b"".join([chunk async for chunk in proto]) if chunked else await proto()
            proto.response_bytes(200, [], b"%d" % len(body))

    body = b" " * (3 * MAX_BUFFERED_BODY_BYTES)
    async with listening(Late()) as (_, port):
        reader, writer = await asyncio.open_connection(HOST, port)
        if chunked:
            writer.write(head(POST, b"Connection: close", b"Transfer-Encoding: chunked"))
            writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        else:
            writer.write(head(POST, b"Connection: close", b"Content-Length: %d" % len(body)) + body)
        assert (await asyncio.wait_for(reader.read(), PATIENCE_S)).endswith(b"\r\n\r\n%d" % len(body))
        writer.close()


async def test_what_an_app_gets_wrong_is_a_503_in_the_error_form() -> None:
    class Broken:
        async def __rsgi__(self, scope: Exchange, proto: Exchange) -> None:
            if scope.path == "/raises":
                raise ZeroDivisionError
            if scope.path == "/injects":
                proto.response_bytes(200, [("x-name", "a\r\nset-cookie: b")], b"")

    async with listening(Broken()) as (_, port):
        for path in ("/raises", "/injects", "/silent"):
            answer = await ask(port, path)
            assert answer.startswith(b"HTTP/1.1 503 "), path
            assert b"set-cookie" not in answer


async def test_pages_answer_head_without_a_body(gate: Gate) -> None:
    async def page() -> Response:
        return Response(200, "text/plain", b"hello")

    async with listening(DataPlane(gate, {"/readyz": page})) as (_, port):
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(head(b"HEAD /readyz HTTP/1.1", b"Connection: close"))
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.endswith(b"\r\n\r\n")
        writer.close()


SEVERAL = (
    head(b"GET /quick?a=b HTTP/1.1", b"X-A: \xc3\xa9", b"X-A: \xff")
    + head(b"POST /quick HTTP/1.1", b"Content-Length: 5")
    + b"hello"
    + head(b"POST /quick HTTP/1.1", b"Transfer-Encoding: chunked")
    + b"3;x=y\r\nabc\r\n4\r\ndefg\r\n0\r\nT: v\r\n\r\n"
    + head(b"POST /quick HTTP/1.1", b"Connection: Upgrade", b"Upgrade: h2c", b"Content-Length: 2")
    + b"ok"
    + head(b"HEAD /quick HTTP/1.1", b"Connection: close")
)


async def test_a_stream_cut_anywhere_is_answered_alike() -> None:
    """However the bytes arrive, the same requests are seen and the same answers given."""
    seen: list[tuple[Any, ...]] = []

    class Echo:
        async def __rsgi__(self, scope: Exchange, proto: Exchange) -> None:
            body = b"".join([chunk async for chunk in proto])
            seen.append((scope.method, scope.path, scope.query_string, scope.headers.get_all("x-a"), body))
            proto.response_bytes(200, [], body)

    whole = [
        ("GET", "/quick", "a=b", ["é", "\udcff"], b""),
        ("POST", "/quick", "", [], b"hello"),
        ("POST", "/quick", "", [], b"abcdefg"),
        ("POST", "/quick", "", [], b"ok"),
        ("HEAD", "/quick", "", [], b""),
    ]
    loop = asyncio.get_running_loop()
    async with listening(Echo()) as (_, port):

        async def send(cuts: list[int]) -> bytes:
            seen.clear()
            reader, writer = await asyncio.open_connection(HOST, port)
            start = 0
            for cut in [*sorted(cuts), len(SEVERAL)]:
                writer.write(SEVERAL[start:cut])
                start = cut
                for _ in range(3):  # let the server read this piece by itself
                    await asyncio.sleep(0)
            try:
                return await asyncio.wait_for(reader.read(), PATIENCE_S)
            finally:
                writer.close()

        @settings(max_examples=60)
        @given(st.lists(st.integers(1, len(SEVERAL) - 1), max_size=12, unique=True))
        def cut_anywhere(cuts: list[int]) -> None:
            answers = asyncio.run_coroutine_threadsafe(send(cuts), loop).result(30)
            assert seen == whole
            assert answers.count(b"HTTP/1.1 200 OK\r\n") == len(whole)

        await asyncio.to_thread(cut_anywhere)


async def test_every_open_connection_is_counted(listen: Callable[..., Any]) -> None:
    async with listening(Held()) as (server, port):
        pairs = [await asyncio.open_connection(HOST, port) for _ in range(3)]
        await until(lambda: server.connections == 3)
        for _, writer in pairs:
            writer.close()
        await until(lambda: server.connections == 0)
