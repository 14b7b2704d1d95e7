"""What the client does when a limiter is dead, hangs, dribbles, refuses, or is none."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.cases.doors import FREE
from tests.conftest import Serve
from tests.integration.client_driver import POLICY, ClientDriver
from tests.moments import PATIENCE_S
from tests.servers.certificates import Authority
from tests.servers.ports import free_port
from tests.servers.tcp_proxy import TcpProxy
from tidegate import BadRequest, Check, Gate, LimiterUnavailable, StoreUnavailable
from tidegate.breaker import BreakerState
from tidegate.client import AsyncClient, BreakerOptions
from tidegate.doors.http import DataPlane

NOBODY = "http://127.0.0.1:1"
FAR_TOO_LATE_S = 60.0
"""No busy machine is as late as that; what waits for more than its deadline is."""
ASK = {"path": "/api/v1/a", "api_key": FREE}


class Says:
    """A server that gives one answer to everything."""

    def __init__(self, status: int, body: str | dict[str, Any], **headers: str) -> None:
        self.status = status
        self.body = body if isinstance(body, str) else json.dumps(body)
        self.headers = [("content-type", "application/json"), *headers.items()]
        self.asked = 0

    async def __rsgi__(self, scope: Any, proto: Any) -> None:
        self.asked += 1
        await proto()
        proto.response_bytes(self.status, self.headers, self.body.encode())


def error(code: str, message: str = "as it is") -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "details": {"field": "path", "message": "not lost"}}}


@contextlib.contextmanager
def deaf_port() -> Iterator[int]:
    """A port at which connections are neither taken nor refused: the queue of its listener is full."""
    with socket.socket() as listener, contextlib.ExitStack() as waiting:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        yield int(listener.getsockname()[1])


@pytest.fixture
async def dribbling() -> AsyncIterator[str]:
    """A server that sends its answer a byte at a time, for ever: no single wait for a byte is long."""

    handlers: list[asyncio.Task[Any]] = []

    async def dribble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        handlers.append(handler)
        with contextlib.suppress(OSError):
            writer.write(b"HTTP/1.1 200 OK\r\nx-long: ")
            while not writer.is_closing():
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.02)
        writer.close()

    server = await asyncio.start_server(dribble, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    await asyncio.gather(*handlers)


async def test_a_limiter_that_hangs_costs_the_deadline(
    serve: Callable[..., Serve],
    new_client: Callable[..., ClientDriver],
) -> None:
    server = serve("--demo")
    asker = new_client(server.url, deadline_s=0.3)
    await asker.check("/a", ip="203.0.113.7")  # a connection is there already, if the machine is quick
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        answer = await asker.check("/a", ip="203.0.113.7")
        assert 0.25 < time.monotonic() - started < FAR_TOO_LATE_S
        assert (answer.allowed, answer.degraded, answer.failed, answer.status) == (True, True, True, 200)
        assert answer.failure == f"{server.url} did not respond in time"
        assert answer.headers == ()
        denying = new_client(server.url, deadline_s=0.3, on_failure="deny")
        answer = await denying.check("/a", ip="203.0.113.7")
        assert (answer.allowed, answer.degraded, answer.failed, answer.status) == (False, True, True, 503)
        assert answer.retry_after == 1.0
        raising = new_client(server.url, deadline_s=0.3, on_failure="raise")
        with pytest.raises(LimiterUnavailable, match="did not respond in time") as raised:
            await raising.check("/a", ip="203.0.113.7")
        assert raised.value.status == 503
        assert [type(one) for one in await raising.check_many([Check.of("/a", ip="203.0.113.7")] * 2)] == [LimiterUnavailable] * 2
        with pytest.raises(LimiterUnavailable):
            await asker.usage(ip="203.0.113.7")
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


def test_on_uvloop(serve: Callable[..., Serve], tmp_path: Path) -> None:
    """Another loop, with transports of its own."""
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    server = serve()

    async def ask() -> None:
        async with AsyncClient(server.url, deadline_s=20) as asker:
            assert [(await asker.check("/login", "POST", ip="203.0.113.7")).remaining for _ in range(3)] == [4, 3, 2]
            asker._core._deadline_s = 0.3
            os.kill(server.process.pid, signal.SIGSTOP)
            try:
                answers = await asyncio.gather(*(asker.check("/a", ip="203.0.113.7") for _ in range(4)))
            finally:
                os.kill(server.process.pid, signal.SIGCONT)
            assert {answer.failure for answer in answers} == {f"{server.url} did not respond in time"}
            asker._core._deadline_s = 20
            assert (await asker.check("/login", "POST", ip="203.0.113.7", cost=0)).remaining == 2
            server.process.terminate()
            server.stop_by_itself()
            assert "did not accept a connection" in ((await asker.check("/a")).failure or "")

    uvloop.run(ask())


async def test_the_deadline_is_for_the_whole_answer(dribbling: str, new_client: Callable[..., ClientDriver]) -> None:
    started = time.monotonic()
    answer = await new_client(dribbling, deadline_s=0.5).check("/a")
    assert 0.4 < time.monotonic() - started < FAR_TOO_LATE_S
    assert answer.failure == f"{dribbling} did not respond in time"


async def test_a_limiter_that_is_killed_and_comes_back(
    serve: Callable[..., Serve],
    new_client: Callable[..., ClientDriver],
    tmp_path: Path,
) -> None:
    first = serve("--demo")
    asker = new_client(first.url)
    assert not (await asker.check("/a", ip="203.0.113.7")).failed
    first.process.kill()
    first.stop_by_itself()
    answer = await asker.check("/a", ip="203.0.113.7")
    assert (answer.allowed, answer.failed) == (True, True)
    assert "did not accept a connection" in answer.failure
    serve("--demo", TIDEGATE_SERVER__HTTP=f"127.0.0.1:{first.port}", wait=False)
    deadline = time.monotonic() + PATIENCE_S
    while (answer := await asker.check("/a", ip="203.0.113.7")).failed and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
    assert not answer.failed


async def test_the_second_server_is_used_if_the_first_accepts_no_connection(
    gate: Gate,
    listen: Callable[..., Any],
    new_client: Callable[..., ClientDriver],
) -> None:
    alive = await listen(DataPlane(gate, {}))
    answer = await new_client([NOBODY, alive]).check(**ASK)
    assert (answer.failed, answer.remaining) == (False, 2)
    with deaf_port() as port:
        answer = await new_client([f"http://127.0.0.1:{port}", alive], deadline_s=5).check(**ASK)
        assert (answer.failed, answer.remaining) == (False, 1)
        told = await new_client([f"http://127.0.0.1:{port}", NOBODY], deadline_s=0.4).check(**ASK)
    assert (
        told.failure
        == f"http://127.0.0.1:{port} did not accept a connection in time; {NOBODY} did not accept a connection: "
        + (told.failure or "").rpartition(": ")[2]
    )


async def test_a_check_that_may_have_been_counted_is_not_repeated(
    gate: Gate,
    listen: Callable[..., Any],
    new_client: Callable[..., ClientDriver],
) -> None:
    alive = await listen(DataPlane(gate, {}))
    async with TcpProxy(int(alive.rpartition(":")[2])) as proxy:
        asker = new_client([f"http://127.0.0.1:{proxy.port}", alive])
        proxy.cut_after = 10  # it was decided, and its answer was lost on the way
        answer = await asker.check(**ASK)
        assert (answer.allowed, answer.failed) == (True, True)
        assert (answer.failure or "").endswith("closed the connection without a response, or does not speak HTTP")
        proxy.cut_after = 10
        looked = await asker.check(**ASK, cost=0)
        assert (looked.failed, looked.remaining) == (False, 2), "what counts nothing is asked again, and one was counted"
        proxy.cut_after = 10
        assert (await asker.usage(FREE)).tier == "free"
        proxy.cut_after = 10
        assert [one.failed for one in await asker.check_many([Check.of(**ASK), Check.of(**ASK, cost=0)])] == [True, True]
        proxy.cut_after = 10
        assert [one.remaining for one in await asker.check_many([Check.of(**ASK, cost=0)] * 2)] == [1, 1]


async def test_the_breaker_spares_a_hung_limiter_and_us(
    gate: Gate,
    listen: Callable[..., Any],
    new_client: Callable[..., ClientDriver],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "tidegate.client")
    async with TcpProxy(int((await listen(DataPlane(gate, {}))).rpartition(":")[2])) as proxy:
        url = f"http://127.0.0.1:{proxy.port}"
        asker = new_client(url, deadline_s=0.2, breaker=BreakerOptions(failures=3, window_s=60, open_s=1.5))
        breaker = asker.client._core._endpoints[0].breaker
        proxy.stall = True
        for _ in range(3):
            assert (await asker.check(**ASK)).failed
        assert breaker.state is BreakerState.OPEN
        connections = proxy.connections
        for _ in range(50):
            answer = await asker.check(**ASK)
            assert answer.failure == f"{url} did not respond in time, and its circuit breaker is open"
        assert proxy.connections == connections, "nothing was asked meanwhile"
        proxy.stall = False
        asker.client._core._deadline_s = FAR_TOO_LATE_S
        deadline = time.monotonic() + PATIENCE_S
        while (await asker.check(**ASK, cost=0)).failed and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        assert breaker.state is BreakerState.CLOSED
        logged = [(record.levelname, record.message) for record in caplog.records if record.name == "tidegate.client"]
        assert [level for level, _ in logged] == ["WARNING", "INFO"]
        assert "on_failure='allow'" in logged[0][1]
        assert logged[1][1] == f"{url} responds again: circuit breaker closed"


async def test_the_second_server_is_used_while_the_breaker_of_the_first_is_open(
    gate: Gate,
    listen: Callable[..., Any],
    new_client: Callable[..., ClientDriver],
) -> None:
    alive = await listen(DataPlane(gate, {}))
    async with TcpProxy(1) as proxy:
        asker = new_client([f"http://127.0.0.1:{proxy.port}", alive], breaker=BreakerOptions(failures=2, window_s=60, open_s=60))
        told = [(await asker.check(**ASK, cost=0)).failed for _ in range(6)]
        # Connections were taken and closed: whether something was counted there nobody knows, but nothing can be, with cost 0.
        assert told == [False] * 6
        assert proxy.connections == 2


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (Says(404, "<h1>not here</h1>"), "answered 404 with a body that is not from Tidegate: check the URL"),
        (Says(502, ""), "answered 502"),
        (Says(301, "", location="http://127.0.0.1:1/"), "answered 301"),
        (Says(200, "hello"), "answered 200"),
        (Says(200, {"allowed": "perhaps"}), "answered 200"),
        (Says(200, "[" * 5000), "answered 200"),
        (Says(401, "log in"), "answered 401"),
        (Says(404, error("NOT_FOUND")), "answered 404: NOT_FOUND as it is"),
        (Says(503, error("INTERNAL")), "answered 503: INTERNAL as it is"),
        (Says(503, error("CATALOG_UNAVAILABLE")), "answered CATALOG_UNAVAILABLE: as it is"),
    ],
    ids=lambda value: f"{value.status} {value.body[:20]}" if isinstance(value, Says) else "",
)
async def test_answers_that_are_none(
    says: Says,
    reason: str,
    listen: Callable[..., Any],
    new_client: Callable[..., ClientDriver],
) -> None:
    url = await listen(says)
    asker = new_client(url)
    answer = await asker.check(**ASK)
    assert (answer.allowed, answer.failed) == (True, True)
    assert f"{url} {reason}" in (answer.failure or "")
    assert [one.failed for one in await asker.check_many([Check.of(**ASK)] * 2)] == [True, True]
    with pytest.raises(LimiterUnavailable):
        await asker.usage(FREE)


async def test_answers_that_are_refusals(listen: Callable[..., Any], new_client: Callable[..., ClientDriver]) -> None:
    for status, code, kind in ((503, "STORE_UNAVAILABLE", StoreUnavailable), (431, "HEADERS_TOO_LARGE", BadRequest)):
        asker = new_client(await listen(Says(status, error(code))))
        with pytest.raises(kind, match="as it is") as raised:
            await asker.check(**ASK)
        assert raised.value.details == {"field": "path", "message": "not lost"}
        assert [type(one) for one in await asker.check_many([Check.of(**ASK)] * 2)] == [kind, kind]


async def test_a_server_without_its_catalog_is_passed_over(
    gate: Gate,
    listen: Callable[..., Any],
    new_client: Callable[..., ClientDriver],
) -> None:
    without = Says(503, error("CATALOG_UNAVAILABLE"))
    asker = new_client([await listen(without), await listen(DataPlane(gate, {}))])
    assert [(await asker.check(**ASK)).remaining for _ in range(3)] == [2, 1, 0]
    assert without.asked == 3


async def test_a_batch_of_another_length_is_none(listen: Callable[..., Any], new_client: Callable[..., ClientDriver]) -> None:
    asker = new_client(await listen(Says(200, {"decisions": []})))
    assert [one.failed for one in await asker.check_many([Check.of(**ASK)] * 2)] == [True, True]


async def test_a_full_pool_is_not_the_limiters_fault(
    gate: Gate,
    listen: Callable[..., Any],
    new_client: Callable[..., ClientDriver],
) -> None:
    async with TcpProxy(int((await listen(DataPlane(gate, {}))).rpartition(":")[2])) as proxy:
        # Opens only if all calls count, also those that did not get a connection: of these there is at least one.
        breaker = BreakerOptions(failures=8)
        asker = new_client(f"http://127.0.0.1:{proxy.port}", deadline_s=4.0, max_connections=1, breaker=breaker)
        proxy.stall = True
        answers = await asyncio.gather(*(asker.check(**ASK) for _ in range(8)))
        failures = sorted((answer.failure or "").partition(" ")[2] for answer in answers)
        assert "was not contacted: all 1 connections were in use" in failures
        assert asker.client._core._endpoints[0].breaker.state is BreakerState.CLOSED
        proxy.stall = False


async def test_a_check_that_is_cancelled_leaves_the_client_whole(gate: Gate, listen: Callable[..., Any]) -> None:
    async with TcpProxy(int((await listen(DataPlane(gate, {}))).rpartition(":")[2])) as proxy:
        asker = ClientDriver("async", f"http://127.0.0.1:{proxy.port}", max_connections=2)
        proxy.stall = True
        given_up = [asyncio.ensure_future(asker.check(**ASK)) for _ in range(4)]
        await asyncio.sleep(0.2)
        for one in given_up:
            one.cancel()
        assert all(isinstance(one, asyncio.CancelledError) for one in await asyncio.gather(*given_up, return_exceptions=True))
        proxy.stall = False
        assert not any(one.failed for one in await asyncio.gather(*(asker.check(**ASK, cost=0) for _ in range(4))))
        await asker.close()


async def test_over_tls(gate: Gate, listen: Callable[..., Any], new_client: Callable[..., ClientDriver], tmp_path: Path) -> None:
    authority = Authority(tmp_path / "tls")
    plain = int((await listen(DataPlane(gate, {}))).rpartition(":")[2])
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    served.load_cert_chain(authority.server_cert, authority.server_key)

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind_reader, behind = await asyncio.open_connection("127.0.0.1", plain)

        async def flow(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while chunk := await source.read(65_536):
                    sink.write(chunk)
                sink.close()

        await asyncio.gather(flow(reader, behind), flow(behind_reader, writer))

    server = await asyncio.start_server(pass_on, "127.0.0.1", 0, ssl=served)
    port = server.sockets[0].getsockname()[1]
    trusting = ssl.create_default_context(cafile=str(authority.ca))
    asker = new_client(f"https://localhost:{port}", ssl_context=trusting, on_failure="raise")
    assert [(await asker.check(**ASK)).remaining for _ in range(3)] == [2, 1, 0]
    for stranger, reason in (
        (new_client(f"https://localhost:{port}"), "its certificate is not trusted"),
        (new_client(f"https://127.0.0.1:{plain}"), "TLS handshake failed"),
        (new_client(f"http://127.0.0.1:{port}"), "closed the connection without a response, or does not speak HTTP"),
    ):
        assert reason in (await stranger.check(**ASK)).failure
    await asker.close()
    server.close()


async def test_a_name_that_is_not_there(new_client: Callable[..., ClientDriver]) -> None:
    answer = await new_client(f"http://no-such-host.invalid:{free_port()}").check(**ASK)
    assert (answer.failure or "").endswith("did not accept a connection: its name cannot be resolved")
