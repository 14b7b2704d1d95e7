"""Fixtures over the servers: some for the whole session, told apart by keys, and factories for tests that break theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.servers.postgres import PostgresServer
from tests.servers.postgres_cluster import PostgresCluster
from tests.servers.redis_cluster import RedisCluster
from tests.servers.redis_sentinel import RedisSentinel
from tests.servers.redis_server import RedisServer


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One Redis for all tests: they leave it as it is and use keys of their own."""
    with RedisServer("redis") as server:
        yield server


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[RedisServer]:
    """One Valkey for all tests: they leave it as it is and use keys of their own."""
    with RedisServer("valkey") as server:
        yield server


@pytest.fixture(scope="session", params=["redis", "valkey"])
def any_redis(request: pytest.FixtureRequest) -> RedisServer:
    """Both, one after the other."""
    server: RedisServer = request.getfixturevalue(f"{request.param}_server")
    return server


@pytest.fixture(scope="session")
def redis_cluster() -> Iterator[RedisCluster]:
    """Three masters without replicas for all tests: they leave the slots where they are."""
    with RedisCluster(masters=3, replicas=0) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def redis_sentinel() -> Iterator[RedisSentinel]:
    """Three sentinels over a master and a replica for all tests: they leave the master where it is."""
    with RedisSentinel() as sentinel:
        yield sentinel


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One PostgreSQL for all tests: they leave it as it is and use databases of their own."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """An empty database on it, which goes with the test."""
    url = postgres_server.new_database()
    yield url
    postgres_server.drop_database(url.rpartition("/")[2])


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[PostgresCluster]:
    """A PostgreSQL primary and two replicas for all tests: they leave their roles as they are and use databases of their own."""
    with PostgresCluster() as cluster:
        yield cluster


@pytest.fixture
def new_redis() -> Iterator[Callable[..., RedisServer]]:
    """Starts a `RedisServer` with these arguments; it ends with the test."""
    yield from _factory(RedisServer)


@pytest.fixture
def new_cluster() -> Iterator[Callable[..., RedisCluster]]:
    """Starts a `RedisCluster` with these arguments; it ends with the test."""
    yield from _factory(RedisCluster)


@pytest.fixture
def new_sentinel() -> Iterator[Callable[..., RedisSentinel]]:
    """Starts a `RedisSentinel` with these arguments; it ends with the test."""
    yield from _factory(RedisSentinel)


@pytest.fixture
def new_postgres() -> Iterator[Callable[..., PostgresServer]]:
    """Starts a `PostgresServer` with these arguments; it ends with the test."""
    yield from _factory(PostgresServer)


@pytest.fixture
def new_postgres_cluster() -> Iterator[Callable[..., PostgresCluster]]:
    """Starts a `PostgresCluster` with these arguments; it ends with the test."""
    yield from _factory(PostgresCluster)


def _factory(kind: type[Any]) -> Iterator[Callable[..., Any]]:
    started: list[Any] = []

    def start(**arguments: Any) -> Any:
        made = kind(**arguments)
        started.append(made)
        made.start()
        return made

    yield start
    for made in started:
        made.stop()
