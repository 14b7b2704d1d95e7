"""TLS connections of the HTTP server, on uvloop as in production: handshakes are bounded, names are required."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from tests.moments import until
from tests.servers.certificates import Authority
from tests.servers.ports import HOST
from tidegate.doors.http_exchange import Exchange
from tidegate.doors.http_server import RESERVED, HttpServer
from tidegate.doors.tls import ServerTls
from tidegate.server.certificates import load
from tidegate.settings import TlsSettings

REQUEST = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


class _Names:
    """Answers with the names of the peer."""

    async def __rsgi__(self, exchange: Exchange, _: Exchange) -> None:
        exchange.response_bytes(200, [], " ".join(exchange.connection.peer_names).encode())


def server_context(authority: Authority, *, mutual: bool = True) -> ssl.SSLContext:
    ca = str(authority.ca) if mutual else ""
    return load(TlsSettings(cert=str(authority.server_cert), key=str(authority.server_key), client_ca=ca)).context


def client_context(authority: Authority, cert: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.ca)
    if cert is not None:
        context.load_cert_chain(*cert)
    return context


@contextlib.asynccontextmanager
async def served(
    tls: ServerTls, max_connections: int = 100, header_timeout_s: float = 30.0
) -> AsyncIterator[tuple[HttpServer, int]]:
    listening = socket.create_server((HOST, 0))
    listening.setblocking(False)
    server = HttpServer(_Names(), header_timeout_s, max_connections=max_connections, tls=tls)
    await server.start(listening)
    port = listening.getsockname()[1]
    writers = []

    async def connect(context: ssl.SSLContext | None = None) -> Streams:
        streams = await asyncio.open_connection(HOST, port, ssl=context)
        writers.append(streams[1])
        return streams

    try:
        yield server, connect
    finally:
        for writer in writers:
            writer.transport.abort()
        await server.stop(5)


async def asked(streams: Streams) -> tuple[int, bytes]:
    """Send a request on an open connection; returns status and body."""
    reader, writer = streams
    writer.write(REQUEST)
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"content-length: "))
    return int(head[9:12]), await reader.readexactly(length)


async def ended(reader: asyncio.StreamReader) -> None:
    """Until the server has closed the connection."""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while await reader.read(1000):
            pass


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await test()

    uvloop.run(main())


def test_names_of_the_peer_and_a_context_that_changes_under_open_connections(authority: Authority) -> None:
    async def test() -> None:
        contexts = [server_context(authority)]
        client = client_context(authority, (authority.client_cert, authority.client_key))
        async with served(ServerTls(lambda: contexts[-1])) as (server, connect):
            first = await connect(client)
            assert await asked(first) == (200, b"client.tidegate.test")
            old = first[1].get_extra_info("ssl_object").getpeercert(True)
            cert, key = authority.issue("rotated", HOST)
            contexts.append(load(TlsSettings(cert=str(cert), key=str(key), client_ca=str(authority.ca))).context)
            second = await connect(client)
            assert await asked(second) == (200, b"client.tidegate.test")
            assert second[1].get_extra_info("ssl_object").getpeercert(True) != old
            assert await asked(first) == (200, b"client.tidegate.test"), "the open connection goes on"
            assert server.connections == 2
            for _, writer in (first, second):
                writer.close()
            await until(lambda: server.connections == 0)

    run(test)


def test_a_client_without_a_certificate_or_of_another_authority_is_refused(authority: Authority) -> None:
    async def test() -> None:
        unrelated = authority.unrelated()
        context = server_context(authority)
        async with served(ServerTls(lambda: context)) as (server, connect):
            for cert in (None, (unrelated.client_cert, unrelated.client_key)):
                # With TLS 1.3 the client learns of it when it reads.
                with contextlib.suppress(ConnectionError, ssl.SSLError):
                    reader, writer = await connect(client_context(authority, cert))
                    writer.write(REQUEST)
                    assert await reader.read() == b""
                    writer.close()
            await until(lambda: server.handshakes_refused["failed"] == 2)
            plain = await connect()
            plain[1].write(REQUEST)
            await ended(plain[0])
            await until(lambda: server.handshakes_refused["failed"] == 3)
            assert server.connections == 0

    run(test)


def test_a_client_whose_certificate_has_none_of_the_names_gets_an_answer_that_says_so(authority: Authority) -> None:
    async def test() -> None:
        context = server_context(authority)
        tls = ServerTls(lambda: context, frozenset({"client.tidegate.test"}))
        async with served(tls) as (server, connect):
            allowed = client_context(authority, (authority.client_cert, authority.client_key))
            assert (await asked(await connect(allowed)))[0] == 200
            other = client_context(authority, authority.issue("other", "other.tidegate.test"))
            streams = await connect(other)
            status, body = await asked(streams)
            assert status == 403
            assert b'"CLIENT_NOT_ALLOWED"' in body
            assert b"(other.tidegate.test) is in tls.client_names" in body
            assert server.handshakes_refused["client_name"] == 1

    run(test)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
def test_tls_1_1_is_refused(authority: Authority) -> None:
    async def test() -> None:
        accepted = server_context(authority, mutual=False)
        async with served(ServerTls(lambda: accepted)) as (server, connect):
            for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
                context = client_context(authority)
                context.minimum_version = context.maximum_version = version
                streams = await connect(context)
                assert (await asked(streams))[0] == 200
                streams[1].close()
            context = client_context(authority)
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
            with pytest.raises((ConnectionError, ssl.SSLError)):
                await connect(context)
            await until(lambda: server.handshakes_refused["failed"] == 1)

    run(test)


def test_handshakes_that_stall_are_dropped_for_later_ones_and_never_close_open_connections(authority: Authority) -> None:
    async def test() -> None:
        context = server_context(authority, mutual=False)
        limit = 8
        async with served(ServerTls(lambda: context), limit) as (server, connect):
            client = client_context(authority)
            idle = [await connect(client) for _ in range(limit)]
            assert [(await asked(each))[0] for each in idle] == [200] * limit
            stalled = [await connect() for _ in range(3 * limit)]
            await until(lambda: server.handshakes_refused["dropped"] == 3 * limit - limit // 2)
            assert server.connections <= limit + RESERVED
            assert [(await asked(each))[0] for each in idle] == [200] * limit, "they were not closed"
            later = await connect(client)
            assert (await asked(later))[0] == 200, "a client that completes its handshake gets in"
            assert server.evicted == 1, "for that, and only then, the longest idle one made room"
            assert len(stalled) == 3 * limit

    run(test)


def test_a_handshake_has_a_time_limit_and_a_half_closed_connection_ends_without_a_warning(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        context = server_context(authority, mutual=False)
        async with served(ServerTls(lambda: context), header_timeout_s=0.2) as (server, connect):
            stalled = await connect()
            await ended(stalled[0])
            await until(lambda: server.handshakes_refused["failed"] == 1)
        async with served(ServerTls(lambda: context)) as (server, connect):
            streams = await connect(client_context(authority))
            streams[1].write(REQUEST)
            streams[1].close()  # says that it sends no more, and waits for the server to say so too
            await streams[1].wait_closed()
            await until(lambda: server.connections == 0)

    run(test)
    assert "eof_received" not in caplog.text
