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

__all__ = [
    "any_redis",
    "new_cluster",
    "new_postgres",
    "new_postgres_cluster",
    "new_redis",
    "new_sentinel",
    "postgres_cluster",
    "postgres_server",
    "postgres_url",
    "redis_cluster",
    "redis_sentinel",
    "redis_server",
    "running_cluster",
    "running_redis",
    "running_sentinel",
    "running_valkey",
    "valkey_server",
]

# One Redis of each kind runs for the whole session. Every file of tests finds it empty, whatever ran before: counters of the same
# key and rule are the same counters.


@pytest.fixture(scope="session")
def running_redis() -> Iterator[RedisServer]:
    """The Redis behind `redis_server`."""
    with RedisServer("redis") as server:
        yield server


@pytest.fixture(scope="session")
def running_valkey() -> Iterator[RedisServer]:
    """The Valkey behind `valkey_server`."""
    with RedisServer("valkey") as server:
        yield server


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[RedisCluster]:
    """The cluster behind `redis_cluster`."""
    with RedisCluster(masters=3, replicas=0) as cluster:
        cluster.be_patient()
        yield cluster


@pytest.fixture(scope="session")
def running_sentinel() -> Iterator[RedisSentinel]:
    """The servers behind `redis_sentinel`."""
    with RedisSentinel() as sentinel:
        yield sentinel


@pytest.fixture(scope="module")
def redis_server(running_redis: RedisServer) -> RedisServer:
    """A Redis for the tests of a file: they leave it as it is and use keys of their own."""
    running_redis.must("FLUSHALL")
    return running_redis


@pytest.fixture(scope="module")
def valkey_server(running_valkey: RedisServer) -> RedisServer:
    """A Valkey for the tests of a file: they leave it as it is and use keys of their own."""
    running_valkey.must("FLUSHALL")
    return running_valkey


@pytest.fixture(scope="module", params=["redis", "valkey"])
def any_redis(request: pytest.FixtureRequest) -> RedisServer:
    """Both, one after the other."""
    server: RedisServer = request.getfixturevalue(f"{request.param}_server")
    return server


@pytest.fixture(scope="module")
def redis_cluster(running_cluster: RedisCluster) -> RedisCluster:
    """Three masters without replicas for the tests of a file: they leave the slots where they are."""
    for master in running_cluster.masters():
        master.must("FLUSHALL")
    return running_cluster


@pytest.fixture(scope="module")
def redis_sentinel(running_sentinel: RedisSentinel) -> RedisSentinel:
    """Three sentinels over a master and a replica for the tests of a file: they leave the master where it is."""
    running_sentinel.master().must("FLUSHALL")
    return running_sentinel


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
