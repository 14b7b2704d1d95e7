"""The servers that other tests lean on do what they say."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import hiredis
import pytest

from tests.moments import PATIENCE_S, until, wait_until
from tests.servers.certificates import Authority
from tests.servers.ports import free_port
from tests.servers.redis_cluster import RedisCluster
from tests.servers.redis_sentinel import RedisSentinel
from tests.servers.redis_server import Client, RedisServer, binary, need
from tests.servers.tcp_proxy import TcpProxy

BOTH = pytest.mark.parametrize("kind", ["redis", "valkey"])
PING = b"*1\r\n$4\r\nPING\r\n"


@BOTH
def test_a_server_starts_answers_and_stops(new_redis: Callable[..., RedisServer], kind: str) -> None:
    server = new_redis(kind=kind)
    assert server.call("SET", "k", 1) == b"OK"
    assert server.call("GET", "k") == b"1"
    assert isinstance(server.call("LPUSH", "k", "x"), hiredis.ReplyError)
    with pytest.raises(RuntimeError, match="WRONGTYPE"):
        server.must("LPUSH", "k", "x")
    assert server.facts("INFO", "server")["tcp_port"] == str(server.port)
    assert server.must("CONFIG", "GET", "save") == [b"save", b""]
    pid = server.pid
    server.restart()
    assert server.pid != pid
    assert server.call("GET", "k") is None, "nothing was persisted"
    server.kill()
    assert not server.alive
    with pytest.raises(ConnectionRefusedError):
        server.call("PING")
    server.start()
    assert server.call("PING") == b"PONG"
    server.stop()
    server.stop()


def test_a_paused_server_keeps_its_connections_and_can_be_stopped(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    client = Client(server.host, server.port, timeout_s=0.2)
    server.pause()
    with pytest.raises(TimeoutError):
        client.call("PING")
    server.resume()
    assert server.call("PING") == b"PONG"
    client.close()
    server.pause()
    process, pid = server._process, server.pid
    server.stop()
    assert process is not None
    assert process.returncode == 0, "it ended by itself, and was not ended by force"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    for harmless in (server.pause, server.resume, server.kill, server.stop):
        harmless()


def test_a_call_after_the_server_closed_the_connection_makes_another(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    first = server.call("CLIENT", "ID")
    other = Client(server.host, server.port)
    assert other.call("CLIENT", "KILL", "ID", first) == 1
    other.close()
    assert server.call("CLIENT", "ID") != first


def test_a_server_that_does_not_start_shows_its_log() -> None:
    with pytest.raises(RuntimeError, match="no-such-directive"):
        RedisServer(options={"no-such-directive": "1"}).start()


def test_passwords_users_and_a_unix_socket(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis(
        options={"requirepass": "secret", "user": ["ann on >pw ~a:* +@all", "bob on >pw ~* -@all +ping"]}, unix_socket=True
    )
    assert server.call("PING") == b"PONG"
    client = Client(server.host, server.port)
    assert str(client.call("GET", "a:1")).startswith("NOAUTH")
    assert client.call("AUTH", "ann", "pw") == b"OK"
    assert client.call("SET", "a:1", "x") == b"OK"
    assert str(client.call("SET", "b:1", "x")).startswith("NOPERM")
    assert client.call("AUTH", "bob", "pw") == b"OK"
    assert str(client.call("GET", "a:1")).startswith("NOPERM")
    client.close()
    with socket.socket(socket.AF_UNIX) as plain:
        plain.connect(str(server.unix_path))
        plain.sendall(PING)
        assert plain.recv(100).startswith(b"-NOAUTH")


def handshake(server: RedisServer, trusted: Path, certificate: tuple[Path, Path] | None = None) -> bytes:
    context = ssl.create_default_context(cafile=trusted)
    if certificate is not None:
        context.load_cert_chain(*certificate)
    with (
        socket.create_connection((server.host, server.tls_port), 5) as plain,
        context.wrap_socket(plain, server_hostname=server.host) as encrypted,
    ):
        encrypted.sendall(PING)
        return encrypted.recv(100)


def test_tls_is_rejected_to_those_who_do_not_know_each_other(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis(tls=True, client_certificates="required")
    own = server.authority
    assert own is not None
    assert server.tls_url.startswith(f"rediss://127.0.0.1:{server.tls_port}?ca=/")
    stranger = own.unrelated()
    assert handshake(server, own.ca, (own.client_cert, own.client_key)) == b"+PONG\r\n"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, stranger.ca, (own.client_cert, own.client_key))
    # With TLS 1.3 the client learns that its certificate is refused when it reads, or finds the connection reset.
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        handshake(server, own.ca, (stranger.client_cert, stranger.client_key))
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        handshake(server, own.ca)


def test_tls_without_client_certificates(new_redis: Callable[..., RedisServer], tmp_path: Path) -> None:
    for wish in ("no", "optional"):
        server = new_redis(tls=True, client_certificates=wish)
        assert server.authority is not None
        assert handshake(server, server.authority.ca) == b"+PONG\r\n"
        assert ("&cert=/" in server.tls_url) == (wish == "optional")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, Authority(tmp_path).ca)


@BOTH
def test_a_cluster_forms_and_a_slot_moves_with_its_keys(new_cluster: Callable[..., RedisCluster], kind: str) -> None:
    cluster = new_cluster(kind=kind, options={"requirepass": "secret"} if kind == "redis" else {})
    first, _, third = cluster.nodes
    assert cluster.masters() == cluster.nodes
    assert cluster.url == "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in cluster.nodes)
    assert [cluster.owner_of(slot) for slot in (0, 16_383)] == [first, third]
    slot = cluster.slot_of("{tide}")
    source = cluster.owner_of(slot)
    to = third if source is first else first
    keys = [f"{{tide}}{number}" for number in range(250)]
    for key in keys[1:]:
        source.must("SET", key, key)
    cluster.begin_migration(slot, to)
    assert cluster.owner_of(slot) is source
    assert str(source.call("GET", keys[0])) == f"ASK {slot} 127.0.0.1:{to.port}"
    assert str(to.call("GET", keys[0])).startswith("MOVED")
    to.must("ASKING")
    to.must("SET", keys[0], keys[0])
    assert cluster.move_keys(slot, to, most=120) == 120
    assert source.must("CLUSTER", "COUNTKEYSINSLOT", slot) == 129
    cluster.finish_migration(slot, to)
    assert cluster.owner_of(slot) is to
    assert [to.must("GET", key) for key in keys] == [key.encode() for key in keys]
    assert all(str(node.call("GET", keys[0])) == f"MOVED {slot} 127.0.0.1:{to.port}" for node in cluster.nodes if node is not to)
    cluster.migrate_slot(slot, source)
    assert cluster.owner_of(slot) is source
    assert source.must("CLUSTER", "COUNTKEYSINSLOT", slot) == 250


def test_a_replica_takes_over_in_a_cluster(new_cluster: Callable[..., RedisCluster]) -> None:
    cluster = new_cluster(replicas=1, node_timeout_ms=500)
    assert len(cluster.nodes) == 6
    old = cluster.owner_of(0)
    (replica,) = cluster.replicas_of(old)
    old.must("SET", "{06S}", "kept")  # slot 0
    assert cluster.slot_of("{06S}") == 0
    assert old.must("WAIT", 1, 5000) == 1
    old.kill()
    wait_until(lambda: replica in cluster.masters(), 60, "the replica is promoted")
    cluster.wait_ok()
    assert cluster.owner_of(0) is replica
    assert replica.must("GET", "{06S}") == b"kept"
    old.start()
    cluster.wait_ok()
    wait_until(lambda: cluster.replicas_of(replica) == [old], 60, "the old master follows the new one")
    assert len(cluster.masters()) == 3


@BOTH
def test_sentinels_promote_a_replica(new_sentinel: Callable[..., RedisSentinel], kind: str) -> None:
    group = new_sentinel(kind=kind, down_after_ms=500, options={"requirepass": "secret"})
    first, second = group.servers
    assert group.url == "redis+sentinel://" + ",".join(f"127.0.0.1:{one.port}" for one in group.sentinels) + "/mymaster"
    assert group.master() is first
    first.must("SET", "k", "v")
    assert first.must("WAIT", 1, 5000) == 1
    if kind == "redis":
        first.kill()
    else:
        group.failover()
    assert group.wait_master(not_port=first.port) is second
    assert second.must("GET", "k") == b"v"
    assert second.must("SET", "k", "w") == b"OK"


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes = PING, size: int = 7) -> bytes:
    writer.write(request)
    return await asyncio.wait_for(reader.readexactly(size), PATIENCE_S)


async def test_the_proxy_delays_in_order_and_splits(redis_server: RedisServer) -> None:
    async with TcpProxy(redis_server.port) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await ask(reader, writer) == b"+PONG\r\n"
        assert (proxy.connections, proxy.bytes_to_server, proxy.bytes_to_client) == (1, len(PING), 7)
        delays = [0.0, 0.2]
        proxy.vary_delay = delays.pop
        before = time.monotonic()
        writer.write(b"*2\r\n$4\r\nECHO\r\n$1\r\na\r\n")
        await until(lambda: len(delays) == 1)
        # What is due at once still waits for what came before.
        writer.write(b"*2\r\n$4\r\nECHO\r\n$1\r\nb\r\n")
        assert await reader.readexactly(14) == b"$1\r\na\r\n$1\r\nb\r\n"
        assert time.monotonic() - before >= 0.2
        assert not delays
        proxy.vary_delay = None
        proxy.split = True
        writer.write(PING)
        pieces = []
        while sum(map(len, pieces)) < 7:
            pieces.append(await asyncio.wait_for(reader.read(100), PATIENCE_S))
        assert b"".join(pieces) == b"+PONG\r\n"
        assert len(pieces) > 1
        writer.close()


async def test_the_proxy_cuts_a_reply_and_takes_the_next_connection(redis_server: RedisServer) -> None:
    async with TcpProxy(redis_server.port) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        proxy.cut_after = 10
        assert await ask(reader, writer) == b"+PONG\r\n"
        writer.write(PING)
        assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b"+PO"
        writer.close()
        assert proxy.cut_after is None
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await ask(reader, writer) == b"+PONG\r\n"
        proxy.drop_all()
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await ask(reader, writer)
        writer.close()


async def test_the_proxy_stalls_rejects_and_rewrites(redis_server: RedisServer) -> None:
    async with TcpProxy(redis_server.port) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await ask(reader, writer) == b"+PONG\r\n"
        proxy.stall = True
        writer.write(PING)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(1), 0.1)
        assert proxy.bytes_forwarded == len(PING) + 7
        proxy.stall = False
        assert await asyncio.wait_for(reader.readexactly(7), PATIENCE_S) == b"+PONG\r\n", "nothing was swallowed"
        proxy.rewrite = lambda chunk: chunk.replace(b"O", b"\xff")
        assert await ask(reader, writer) == b"+P\xffNG\r\n"
        proxy.rewrite = None
        proxy.refuse = True
        refused, other = await asyncio.open_connection("127.0.0.1", proxy.port)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await ask(refused, other)
        other.close()
        assert await ask(reader, writer) == b"+PONG\r\n", "those that were there go on"
        assert (proxy.connections, proxy.open_connections) == (2, 1)
        writer.close()


async def test_the_proxy_closes_when_the_server_is_gone() -> None:
    async with TcpProxy(free_port()) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
        writer.close()


def test_ports_leave_room_for_the_bus() -> None:
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
    assert all(port + 10_000 < 32_768 for port in ports)


def test_a_missing_binary_skips_and_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert binary("redis") is None
    with pytest.raises(pytest.skip.Exception, match="Debian package redis-server"):
        need("redis")
