"""The PostgreSQL servers that other tests lean on do what they say."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.moments import PATIENCE_S
from tests.servers import postgres
from tests.servers.postgres import PostgresServer, need, programs
from tests.servers.postgres_cluster import PostgresCluster
from tests.servers.process_tree import has_ended

IS_TLS_SPOKEN = b"\x00\x00\x00\x08\x04\xd2\x16\x2f"
"""What a client may ask first, see "protocol-flow" in PostgreSQL's manual; ours answer N."""


def begin(connection: psycopg.Connection[Any], query: bytes) -> None:
    connection.pgconn.send_query(query)
    connection.pgconn.flush()


def has_answered(connection: psycopg.Connection[Any], within_s: float) -> bool:
    return select.select([connection.fileno()], [], [], within_s)[0] != []


def test_a_server_keeps_what_it_has_committed(new_postgres: Callable[..., PostgresServer]) -> None:
    server = new_postgres(options={"max_connections": 20, "application_name": "it's"})
    assert server.execute("SHOW max_connections") == [("20",)]
    assert server.execute("SHOW server_encoding") == [("UTF8",)]
    assert server.execute("CREATE TABLE kept (number int)") == []
    server.execute("INSERT INTO kept VALUES (1)")
    pid = server.pid
    server.restart()
    assert server.pid != pid
    server.execute("INSERT INTO kept VALUES (%s)", parameters=[2])
    with closing(psycopg.connect(server.url())) as busy:
        begin(busy, b"SELECT pg_sleep(60)")
        pids = server.pids
        assert len(pids) > 4
        server.kill()
        assert all(map(has_ended, pids))
        assert server.pids == []
        assert has_answered(busy, 5), "its connections are closed"
    assert not server.alive
    with pytest.raises(psycopg.OperationalError, match="refused"):
        server.execute("SELECT 1")
    server.start()
    assert server.execute("TABLE kept") == [(1,), (2,)]
    server.stop()
    server.stop()


def test_a_paused_server_keeps_its_connections_and_can_be_stopped(new_postgres: Callable[..., PostgresServer]) -> None:
    server = new_postgres()
    with closing(psycopg.connect(server.url())) as connection:
        server.pause()
        assert not server.alive
        begin(connection, b"SELECT 1")
        newcomer = socket.create_connection((server.host, server.port), 0.3)
        newcomer.sendall(IS_TLS_SPOKEN)
        with pytest.raises(TimeoutError):
            newcomer.recv(1)
        assert not has_answered(connection, 0)
        server.resume()
        assert has_answered(connection, 5)
        newcomer.settimeout(PATIENCE_S)
        assert newcomer.recv(1) == b"N"
        newcomer.close()
    assert server.execute("SELECT 1") == [(1,)]
    server.pause()
    process, pids = server._process, server.pids
    server.stop()
    assert process is not None
    assert process.returncode == 0, "it ended by itself, and was not ended by force"
    assert all(map(has_ended, pids))
    for harmless in (server.pause, server.resume, server.kill, server.terminate, server.stop):
        harmless()
    server.start()
    server.pause()
    pids = server.pids
    server.kill()
    assert all(map(has_ended, pids))


def test_a_server_that_does_not_end_is_made_to(
    new_postgres: Callable[..., PostgresServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "STOP_S", 0.2)
    monkeypatch.setattr(postgres, "QUIT_S", 0.2)
    server = new_postgres()
    with closing(psycopg.connect(server.url())) as connection:
        os.kill(connection.info.backend_pid, signal.SIGSTOP)
        pids = server.pids
        server.stop()
    assert all(map(has_ended, pids))
    server.start()
    assert server.execute("SELECT 1") == [(1,)]


def test_a_server_that_does_not_start_shows_its_log() -> None:
    server = PostgresServer(options={"no_such_parameter": 1})
    with pytest.raises(RuntimeError, match="no_such_parameter"):
        server.start()


def test_later_servers_begin_with_a_copy(postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    run = postgres.run

    def note(*command: str | Path, **arguments: Any) -> None:
        ran.append(Path(command[0]).name)
        run(*command, **arguments)

    monkeypatch.setattr(postgres, "run", note)
    with PostgresServer() as server:
        assert server.execute("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace") == [(0,)]
        assert server.data.stat().st_uid == postgres_server.data.stat().st_uid != 0
    assert ran == ["cp"]


def test_databases_are_made_and_removed_in_use(postgres_server: PostgresServer, postgres_url: str) -> None:
    first, second = postgres_server.new_database(), postgres_server.new_database()
    assert len({first, second, postgres_url}) == 3
    name = first.rpartition("/")[2]
    with pytest.raises(psycopg.errors.DuplicateDatabase):
        postgres_server.create_database(name)
    postgres_server.execute("CREATE TABLE here ()", name)
    with psycopg.connect(second) as connection, pytest.raises(psycopg.errors.UndefinedTable):
        connection.execute("TABLE here")
    with psycopg.connect(first) as connection:
        for _ in range(2):
            postgres_server.drop_database(name)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(first)
    postgres_server.create_database('odd "näme"/')
    with psycopg.connect(postgres_server.url('odd "näme"/')) as connection:
        assert connection.info.dbname == 'odd "näme"/'
    for odd in ('odd "näme"/', second.rpartition("/")[2]):
        postgres_server.drop_database(odd)


def test_replicas_show_what_the_primary_writes(postgres_cluster: PostgresCluster) -> None:
    primary, replicas = postgres_cluster.primary, postgres_cluster.replicas
    name = primary.new_database().rpartition("/")[2]
    primary.execute("CREATE TABLE t (number int)", name)
    primary.execute("INSERT INTO t VALUES (1)", name)
    postgres_cluster.wait_caught_up()
    for replica, url in zip(replicas, postgres_cluster.replica_urls(name), strict=True):
        assert replica.execute("TABLE t", name) == [(1,)]
        with psycopg.connect(url) as connection, pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            connection.execute("INSERT INTO t VALUES (2)")
    names = primary.execute("SELECT application_name FROM pg_stat_replication ORDER BY 1")
    assert names == sorted((replica.name,) for replica in replicas)
    with psycopg.connect(postgres_cluster.url(name)) as connection:
        assert connection.info.port == primary.port
    assert postgres_cluster.url().endswith(f",127.0.0.1:{replicas[-1].port}/tidegate?target_session_attrs=read-write")
    primary.drop_database(name)


def test_a_replica_lags_while_its_replay_is_paused(postgres_cluster: PostgresCluster) -> None:
    primary, (late, prompt) = postgres_cluster.primary, postgres_cluster.replicas
    name = primary.new_database().rpartition("/")[2]
    primary.execute("CREATE TABLE t (number int)", name)
    postgres_cluster.wait_caught_up()
    late.pause_replay()
    primary.execute("INSERT INTO t VALUES (1)", name)
    prompt.caught_up(primary)
    with pytest.raises(TimeoutError, match="has replayed until"):
        late.caught_up(primary, timeout_s=0.3)
    assert [replica.execute("TABLE t", name) for replica in (late, prompt)] == [[], [(1,)]]
    late.resume_replay()
    late.caught_up(primary)
    assert late.execute("TABLE t", name) == [(1,)]
    primary.drop_database(name)


def test_a_replica_takes_over_and_the_other_follows(new_postgres_cluster: Callable[..., PostgresCluster]) -> None:
    cluster = new_postgres_cluster(options={"max_connections": 20})
    primary, (first, second) = cluster.primary, cluster.replicas
    primary.execute("CREATE TABLE t (number int)")
    primary.execute("INSERT INTO t VALUES (1)")
    cluster.wait_caught_up()
    primary.pause()
    assert first.execute("TABLE t") == [(1,)], "a replica answers while its primary hangs"
    primary.kill()
    first.promote()
    cluster.follow(second, first)
    with psycopg.connect(cluster.url()) as connection:
        assert connection.info.port == first.port
        connection.execute("INSERT INTO t VALUES (2)")
    cluster.wait_caught_up()
    assert second.execute("TABLE t") == [(1,), (2,)]
    # Each comes back as what it was.
    for server in (first, second):
        server.restart()
    second.wait_streaming()
    first.execute("INSERT INTO t VALUES (3)")
    cluster.wait_caught_up()
    assert second.execute("TABLE t") == [(1,), (2,), (3,)]
    cluster.stop()
    assert not any(server.alive for server in cluster.servers)


def test_an_interrupted_script_leaves_nothing() -> None:
    script = """
from tests.servers.postgres import PostgresServer
from tests.servers.postgres_cluster import PostgresCluster
killed = PostgresServer()
killed.start()
print(killed.directory, (killed.data / "postmaster.pid").read_text().split()[-2])
killed.kill()
cluster = PostgresCluster(replicas=1)
cluster.start()
cluster.primary.pause()
print(*cluster.primary.pids, *cluster.replicas[0].pids, flush=True)
raise KeyboardInterrupt
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=Path.cwd(), capture_output=True, text=True, timeout=60, check=False
    )
    assert "KeyboardInterrupt" in ended.stderr
    first, second = ended.stdout.splitlines()
    directory, segment = first.split()
    pids = [int(pid) for pid in second.split()]
    assert len(pids) > 8
    assert all(map(has_ended, pids))
    assert not Path(directory).exists()
    segments = [line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()]
    assert segment not in segments


def test_the_newest_version_is_taken_and_a_missing_one_skips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_VERSIONS", tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    for name in ("9.6/bin/postgres", "18/bin/psql"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert programs() is None
    with pytest.raises(pytest.skip.Exception, match="Debian package postgresql"):
        need()
    for name in ("9/bin/postgres", "15/bin/postgres"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert programs() == tmp_path / "15" / "bin"
