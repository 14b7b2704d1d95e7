"""`tidegate doctor` looks at the catalog, its replicas and the listeners, changes nothing, and never shows a password."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import inspect, text
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.moments import PATIENCE_S
from tests.servers import forked
from tests.servers.ports import free_port
from tests.servers.postgres import PostgresServer
from tests.servers.postgres_cluster import PostgresCluster
from tests.servers.redis_server import RedisServer
from tidegate.catalog.sql.engine import open_engine
from tidegate.catalog.sql.schema import downgrade, upgrade
from tidegate.errors import SettingsError

Found = dict[str, tuple[bool | None, str]]
"""What was looked at → whether it is well, and what was found; of replicas, the last one."""


def _doctor(directory: Path, **environment: str) -> tuple[int, list[dict[str, Any]], str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}
    ended = forked.run(("doctor", "--json"), PATIENCE_S, cwd=directory, env={**plain, **environment})
    return ended.returncode, json.loads(ended.stdout), ended.stdout + ended.stderr


def _found(directory: Path, **environment: str) -> tuple[int, Found]:
    listeners = {name: f"127.0.0.1:{free_port()}" for name in ("HTTP", "ADMIN", "GRPC")}
    addresses = {f"TIDEGATE_SERVER__{name}": address for name, address in listeners.items()}
    code, findings, _ = _doctor(directory, **{**addresses, **environment})
    return code, {each["what"]: (each["ok"], each["finding"]) for each in findings}


async def _state(url: str) -> tuple[Any, ...]:
    """All that a database holds; of a SQLite file its bytes, and what lies beside it."""
    if url.startswith("sqlite"):
        file = Path(url.removeprefix("sqlite:///"))
        return tuple(sorted((path.name, path.read_bytes()) for path in file.parent.iterdir()))
    engine = open_engine(url)
    try:
        async with engine.connect() as connection:
            tables = await connection.run_sync(lambda held: sorted(inspect(held).get_table_names()))
            return tuple([(table, await _rows(connection, table)) for table in tables])
    finally:
        await engine.dispose()


async def _rows(connection: AsyncConnection, table: str) -> list[str]:
    return sorted(str(row) for row in (await connection.execute(text(f'SELECT * FROM "{table}"'))).all())


async def _write(url: str, *statements: str) -> None:
    engine = open_engine(url)
    async with engine.begin() as connection:
        for statement in statements:
            await connection.execute(text(statement))
    await engine.dispose()


@pytest.mark.empty_database
async def test_a_new_database_is_left_empty(catalog_url: str, tmp_path: Path) -> None:
    before = await _state(catalog_url)
    code, found = _found(tmp_path, TIDEGATE_CATALOG__URL=catalog_url)
    ok, said = found["catalog"]
    assert (code, ok) == (0, True), found
    assert "'tidegate serve'" in said
    assert "creates it" in said
    assert await _state(catalog_url) == before


async def test_an_old_schema_is_reported_and_not_changed(catalog_url: str, tmp_path: Path) -> None:
    head = await upgrade(catalog_url)
    await downgrade(catalog_url, "0002")
    before = await _state(catalog_url)
    code, found = _found(tmp_path, TIDEGATE_CATALOG__URL=catalog_url)
    ok, said = found["catalog"]
    assert (code, ok) == (0, None), found
    assert "schema 0002 of an older version" in said
    assert f"'tidegate serve' upgrades it to {head}" in said
    assert "'tidegate db upgrade'" in said
    assert await _state(catalog_url) == before
    await upgrade(catalog_url)
    before = await _state(catalog_url)
    assert _found(tmp_path, TIDEGATE_CATALOG__URL=catalog_url)[1]["catalog"][0] is True
    assert await _state(catalog_url) == before


async def test_a_catalog_in_use_is_counted(catalog_url: str, tmp_path: Path) -> None:
    await upgrade(catalog_url)
    await _write(catalog_url, "INSERT INTO tiers (name, limits, managed_by_file) VALUES ('free', '[]', false)")
    engine = open_engine(catalog_url)
    async with engine.connect():  # as a server holds it
        _, found = _found(tmp_path, TIDEGATE_CATALOG__URL=catalog_url)
    await engine.dispose()
    assert found["catalog"][0] is True
    assert "version 0, 1 tiers" in found["catalog"][1]


@pytest.mark.parametrize(
    ("statements", "said"),
    [
        (("UPDATE alembic_version SET version_num = '9999'", "UPDATE policy_state SET runs_from = '9999'"), "newer Tidegate"),
        (("DROP TABLE alembic_version",), "tables of another program"),
        (("DELETE FROM policy_state",), "cannot be read as a catalog"),
        (("DROP TABLE tiers CASCADE", "DROP TABLE policy_state CASCADE"), "cannot be read as a catalog"),
    ],
)
async def test_a_database_of_others_is_rejected(catalog_url: str, tmp_path: Path, statements: tuple[str, ...], said: str) -> None:
    await upgrade(catalog_url)
    sqlite = catalog_url.startswith("sqlite")
    await _write(catalog_url, *(each.removesuffix(" CASCADE") if sqlite else each for each in statements))
    before = await _state(catalog_url)
    code, found = _found(tmp_path, TIDEGATE_CATALOG__URL=catalog_url)
    assert code == 1
    assert found["catalog"][0] is False
    assert said in found["catalog"][1]
    assert await _state(catalog_url) == before


def test_files_that_are_no_catalog(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database, but long enough to look at " * 100)
    for file, said in (("text.db", "not a SQLite database"), ("absent/x.db", "a file in a writable directory")):
        code, found = _found(tmp_path, TIDEGATE_CATALOG__URL=f"sqlite:///{tmp_path}/{file}")
        assert (code, found["catalog"][0]) == (1, False)
        assert said in found["catalog"][1]
    assert [path.name for path in tmp_path.iterdir()] == ["text.db"]


def test_listeners_of_a_server_that_does_not_run(tmp_path: Path) -> None:
    code, found = _found(tmp_path)
    assert code == 0
    assert found["control plane"][0] is found["gRPC listener"][0] is True
    assert found["gRPC listener"][1].endswith("is free")
    assert _found(tmp_path, TIDEGATE_SERVER__GRPC="")[1]["gRPC listener"] == (None, "off")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for name, what, key in (("GRPC", "gRPC listener", "grpc"), ("ADMIN", "control plane", "admin")):
            code, found = _found(tmp_path, **{f"TIDEGATE_SERVER__{name}": address})
            assert (code, found[what][0]) == (1, False)
            assert f"server.{key} = '{address}': the port is in use" in found[what][1]
            assert f'{key} = "" disables the ' in found[what][1]
    http = f"127.0.0.1:{free_port()}"
    _, found = _found(tmp_path, TIDEGATE_SERVER__HTTP=http, TIDEGATE_SERVER__GRPC=http)
    assert found["gRPC listener"][0] is False
    assert "has the port of server.http" in found["gRPC listener"][1]


def test_listeners_of_a_server_that_runs(serve: Callable[..., Any], tmp_path: Path) -> None:
    server = serve("--demo", grpc=True, admin=True)
    listeners = {name: value for name, value in server.environment.items() if name.startswith("TIDEGATE_SERVER__")}
    code, found = _found(tmp_path, **listeners)
    assert code == 0, found
    assert found["server database"][0] is found["control plane"][0] is found["gRPC listener"][0] is True
    assert found["gRPC listener"][1] == f"something listens at 127.0.0.1:{server.grpc_port}"
    code, found = (
        _found(tmp_path, **listeners, TIDEGATE_SERVER__GRPC=f"127.0.0.1:{free_port()}")
        if False
        else _found(tmp_path, **{**listeners, "TIDEGATE_SERVER__GRPC": f"127.0.0.1:{free_port()}"})
    )
    assert (code, found["gRPC listener"][0]) == (1, False)
    assert "although Tidegate runs" in found["gRPC listener"][1]


def test_replicas_are_checked(postgres_cluster: PostgresCluster, tmp_path: Path) -> None:
    database = postgres_cluster.primary.new_database()
    name = database.rpartition("/")[2]
    forked.run(("db", "upgrade"), PATIENCE_S, env={**os.environ, "TIDEGATE_CATALOG__URL": database}).check_returncode()
    postgres_cluster.wait_caught_up()
    replicas = [url.replace("postgres@", "postgres:secret-word@") for url in postgres_cluster.replica_urls(name)]
    gone = f"postgresql://postgres:secret-word@127.0.0.1:1/{name}"
    _, found, said = _doctor(tmp_path, TIDEGATE_CATALOG__URL=database, TIDEGATE_CATALOG__REPLICAS=",".join([*replicas, gone]))
    looked = [(each["ok"], str(each["finding"])) for each in found if each["what"] == "replica"]
    assert [ok for ok, _ in looked] == [True, True, False], looked
    assert "version 0" in looked[0][1]
    assert "127.0.0.1:1" in looked[2][1]
    assert "cannot be read as a replica" in looked[2][1]
    assert "secret-word" not in said
    postgres_cluster.primary.drop_database(name)


@pytest.fixture
def limited_role(postgres_server: PostgresServer, postgres_url: str) -> Iterator[str]:
    """The URL of an empty database for a role that may connect, and no more: as PostgreSQL 15 has it by default."""
    database = postgres_url.rpartition("/")[2]
    postgres_server.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC", database)
    postgres_server.execute("CREATE ROLE limited LOGIN", database)
    yield postgres_url.replace("postgres@", "limited@")
    postgres_server.execute("DROP OWNED BY limited", database)
    postgres_server.execute("DROP ROLE limited", database)


async def test_a_role_that_may_not_make_tables(limited_role: str, postgres_server: PostgresServer, tmp_path: Path) -> None:
    code, found = await asyncio.to_thread(_found, tmp_path, TIDEGATE_CATALOG__URL=limited_role)
    assert (code, found["catalog"][0]) == (1, False)
    assert "GRANT CREATE ON SCHEMA public TO limited" in found["catalog"][1]
    with pytest.raises(SettingsError, match="GRANT USAGE, CREATE ON SCHEMA public"):
        await upgrade(limited_role)
    postgres_server.execute("GRANT CREATE ON SCHEMA public TO limited", limited_role.rpartition("/")[2])
    await upgrade(limited_role)
    code, found = await asyncio.to_thread(_found, tmp_path, TIDEGATE_CATALOG__URL=limited_role)
    assert (code, found["catalog"][0]) == (0, True)


async def test_why_a_postgres_cannot_be_had(postgres_url: str, tmp_path: Path) -> None:
    base, _, database = postgres_url.rpartition("/")
    closed = free_port()
    for url, said in (
        (postgres_url.replace("postgres@", "nobody-of-that-name@"), "createuser"),
        (f"{base}/absent-database", "createdb absent-database"),
        (f"postgresql://postgres@127.0.0.1:{closed}/{database}", "no server answers there"),
    ):
        with pytest.raises(SettingsError) as refused:
            await upgrade(url)
        assert said in refused.value.message
        assert len([each for each in ("createuser", "createdb", "no server") if each in refused.value.message]) == 1
    code, found = await asyncio.to_thread(
        _found, tmp_path, TIDEGATE_CATALOG__URL=postgres_url.replace("postgres@", "nobody-of-that-name@")
    )
    assert (code, found["catalog"][0]) == (1, False)
    assert "createuser" in found["catalog"][1]
    assert "createdb" not in found["catalog"][1]


async def test_other_users_may_read_the_file(tmp_path: Path) -> None:
    await upgrade(f"sqlite:///{tmp_path}/x.db")
    code, found = await asyncio.to_thread(_found, tmp_path, TIDEGATE_CATALOG__URL=f"sqlite:///{tmp_path}/x.db")
    assert (code, found["catalog"][0]) == (0, True)
    await asyncio.to_thread(Path.chmod, tmp_path / "x.db", 0o644)
    code, found = await asyncio.to_thread(_found, tmp_path, TIDEGATE_CATALOG__URL=f"sqlite:///{tmp_path}/x.db")
    assert (code, found["catalog"][0]) == (0, None)
    assert "chmod 600" in found["catalog"][1]


def test_a_redis_that_answers_ping_and_rejects_the_script_is_wrong(any_redis: RedisServer, tmp_path: Path) -> None:
    any_redis.must("ACL", "SETUSER", "doctor", "reset", "on", ">pw", "~*", "&*", "+@all", "-evalsha", "-eval")
    url = any_redis.url.replace("redis://", "redis://doctor:pw@")
    code, found = _found(tmp_path, TIDEGATE_COUNTERS__URL=url, TIDEGATE_COUNTERS__TIMEOUT_MS="5000")
    assert (code, found["counters"][0]) == (1, False)
    assert "evalsha" in found["counters"][1]
    any_redis.must("ACL", "SETUSER", "doctor", "+evalsha")
    code, found = _found(tmp_path, TIDEGATE_COUNTERS__URL=url, TIDEGATE_COUNTERS__TIMEOUT_MS="5000")
    assert (code, found["counters"][0]) == (0, True), found
    any_redis.must("ACL", "DELUSER", "doctor")
