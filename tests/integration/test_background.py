"""Every background task of an instance is killed once and comes back; and the faults that once ended some of them for good."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from pygrpc_native import NativeGrpcFront
from sqlalchemy import text

from tests.integration.ratelimit_client import ask, request
from tests.moments import PATIENCE_S, until
from tests.servers.postgres_cluster import PostgresCluster
from tests.servers.redis_cluster import RedisCluster
from tests.servers.redis_sentinel import NAME, RedisSentinel
from tests.servers.tcp_proxy import TcpProxy
from tidegate.background import SUPERVISOR
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.follower import CatalogFollower
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.tables import policy_state
from tidegate.counters import Charge
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Decision
from tidegate.doors.grpc import listener
from tidegate.doors.grpc.messages import OK
from tidegate.errors import CatalogUnavailable, StoreUnavailable
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.policy.toml_reader import parse_policy
from tidegate.server.instance import Instance
from tidegate.server.run import running
from tidegate.settings import CatalogSettings, CounterSettings, EnvoySettings, PolicySettings, ServerSettings, Settings

POLICY = '[[tiers]]\nname = "{name}"\nlimits = ["100/minute"]\n'
ENVOY = "domain: d\ndescriptors: [{key: k, rate_limit: {unit: minute, requests_per_unit: 5}}]\n"
ON_ONE_MACHINE = {
    "blocks",
    "catalog_follower",
    "envoy_config_watcher",
    "grpc_receiver",
    "ledger_retention",
    "ledger_writer",
    "memory_sweep",
    "notifications_delivery",
    "notifications_writer",
    "policy_file_watcher",
    "shadow_violations_retention",
    "shadow_violations_writer",
    "violations_retention",
    "violations_writer",
}
ON_SERVERS = {
    "catalog_announcements",
    "blocks",
    "catalog_follower",
    "instance_states",
    "ledger_retention",
    "ledger_writer",
    "notifications_delivery",
    "notifications_writer",
    "policy_file_watcher",
    "redis_connection",
    "redis_heartbeat",
    "redis_recovery",
    "redis_topology",
    "replica_probe",
    "shadow_violations_retention",
    "shadow_violations_writer",
    "violations_retention",
    "violations_writer",
}


def supervised() -> dict[str, list[asyncio.Task[Any]]]:
    """The background tasks of this event loop, by name."""
    tasks: dict[str, list[asyncio.Task[Any]]] = {}
    for task in asyncio.all_tasks():
        if task.get_name() in SUPERVISOR.failures:
            tasks.setdefault(task.get_name(), []).append(task)
    return tasks


async def kill(task: asyncio.Task[Any]) -> None:
    """Let what a task waits for fail, which ends its work with an exception that nothing in it expects.

    Again where that had no effect: what it waits for may have come just then, or a library may have caught the exception.
    """
    name = task.get_name()
    failures = SUPERVISOR.failures[name]
    async with asyncio.timeout(PATIENCE_S):
        while SUPERVISOR.failures[name] == failures:
            waiter = getattr(task, "_fut_waiter", None)
            if waiter is None or not waiter.cancel():
                await asyncio.sleep(0.01)
                continue
            for _ in range(100):
                await asyncio.sleep(0.01)
                if SUPERVISOR.failures[name] != failures:
                    break


async def killed_once(instance: Instance, expected: set[str]) -> None:
    """Kill each task, see it counted, reported and running again."""
    await until(lambda: set(supervised()) >= expected)
    assert set(supervised()) == expected
    async with httpx.AsyncClient(base_url=f"http://{instance.address}", timeout=PATIENCE_S) as http:
        # One after the other: a task that ends takes along those that it has started itself.
        for name in sorted(expected):
            failures = SUPERVISOR.failures[name]
            task = supervised()[name][0]
            await kill(task)
            await until(lambda name=name, failures=failures: SUPERVISOR.failures[name] == failures + 1)
            health = await http.get("/health")
            component = health.json()["components"]["rate_limiter"]
            assert (health.status_code, component["status"]) == (503, "unhealthy")
            assert name in component["reason"]
            told = f'rate_limiter_background_failures_total{{task="{name}"}} {failures + 1}.0'
            assert told in (await http.get("/metrics")).text
            assert not task.done()
        assert (await http.get("/readyz")).status_code == 200, "it still decides"
    await until(lambda: set(supervised()) == expected)


async def answers_grpc(instance: Instance) -> None:
    sent = request([("k", "v")], domain="nobody's")
    assert (await asyncio.to_thread(ask, instance.grpc_address, sent)).overall_code == OK


class FailingFront:
    """The gRPC server, whose first batch of calls cannot be taken."""

    def __init__(self, front: Any) -> None:
        self._front = front
        self.failed = False

    def recv_batch(self, most: int) -> Any:
        if not self.failed:
            self.failed = True
            raise MemoryError("no room for a batch")
        return self._front.recv_batch(most)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._front, name)


async def test_the_thread_that_takes_grpc_calls_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(
        server=ServerSettings(http="127.0.0.1:0", admin="", grpc="127.0.0.1:0", drain_s=0),
        catalog=CatalogSettings(url=f"sqlite:///{tmp_path}/tidegate.db"),
    )
    before = SUPERVISOR.failures.get("grpc_receiver", 0)
    monkeypatch.setattr(listener, "NativeGrpcFront", lambda *given, **named: FailingFront(NativeGrpcFront(*given, **named)))
    async with running(settings) as instance:
        await until(lambda: SUPERVISOR.failures["grpc_receiver"] == before + 1)
        await answers_grpc(instance)


async def follows_the_file(instance: Instance, file: Path) -> None:
    """The watcher takes a change of the policy file, and the follower puts it into force."""
    version = instance.cached.version
    await asyncio.to_thread(file.write_text, POLICY.format(name="second"))
    await until(lambda: instance.cached.version > version)
    assert await instance.cached.tier("second") is not None


@pytest.fixture
def policy_file(tmp_path: Path) -> Path:
    file = tmp_path / "policy.toml"
    file.write_text(POLICY.format(name="first"))
    return file


async def test_each_task_of_one_machine_comes_back(tmp_path: Path, policy_file: Path) -> None:
    (tmp_path / "envoy.yaml").write_text(ENVOY)
    settings = Settings(
        server=ServerSettings(http="127.0.0.1:0", admin="", grpc="127.0.0.1:0", drain_s=0),
        policy=PolicySettings(file=str(policy_file)),
        catalog=CatalogSettings(url=f"sqlite:///{tmp_path}/tidegate.db"),
        envoy=EnvoySettings(config=str(tmp_path / "envoy.yaml")),
    )
    async with running(settings) as instance:
        await killed_once(instance, ON_ONE_MACHINE)
        await follows_the_file(instance, policy_file)
        (tmp_path / "envoy.yaml").write_text(ENVOY.replace("domain: d", "domain: other"))
        assert instance.listeners.grpc is not None
        await until(lambda: "other" in instance.listeners.grpc._service.domains)  # type: ignore[operator, union-attr]
        await answers_grpc(instance)
    assert supervised() == {}


async def test_each_task_over_servers_comes_back(
    policy_file: Path, postgres_cluster: PostgresCluster, redis_cluster: RedisCluster
) -> None:
    database = postgres_cluster.primary.new_database().rpartition("/")[2]
    settings = Settings(
        server=ServerSettings(http="127.0.0.1:0", admin="", grpc="", drain_s=0),
        policy=PolicySettings(file=str(policy_file)),
        catalog=CatalogSettings(url=postgres_cluster.url(database), replicas=tuple(postgres_cluster.replica_urls(database))),
        counters=CounterSettings(url=redis_cluster.url, timeout_ms=5000),
    )
    async with running(settings) as instance:
        await killed_once(instance, ON_SERVERS)
        await follows_the_file(instance, policy_file)
        beats = len([task for task in supervised()["redis_connection"] if not task.done()])
        assert beats >= len(redis_cluster.masters()), "all connections keep themselves up"
        await until(lambda: instance.follower._channel.connected)  # type: ignore[union-attr]
    assert supervised() == {}
    postgres_cluster.primary.drop_database(database)


@pytest.fixture
async def catalog(catalog_url: str) -> AsyncIterator[SqlCatalog]:
    opened = await SqlCatalog.open(catalog_url)
    yield opened
    await opened.close()


async def test_a_follower_outlives_an_empty_state(catalog: SqlCatalog) -> None:
    """As during a restore that empties the tables first: from then on no change was followed any more."""
    await catalog.apply_policy(parse_policy(POLICY.format(name="first")), "1")
    cached = CachedCatalog(catalog)
    follower = CatalogFollower(catalog, cached, poll_s=0.01)
    task = SUPERVISOR.start("catalog_follower", follower.run)
    failures = SUPERVISOR.failures["catalog_follower"]
    await until(lambda: cached.version > 0)
    async with catalog.database.transaction() as connection:
        row = (await connection.execute(policy_state.select())).mappings().one()
        await connection.execute(text("DELETE FROM policy_state"))
    await until(lambda: follower.failing)
    for refused in (
        catalog.changes(0),
        catalog.version(),
        catalog.caller_policy(),
        catalog.api_key("0" * 64),
        catalog.apply_policy(parse_policy(POLICY.format(name="second")), "2"),
    ):
        with pytest.raises(CatalogUnavailable, match="no row in policy_state: restore a backup"):
            await refused
    async with catalog.database.transaction() as connection:
        await connection.execute(policy_state.insert(), dict(row))
    await until(lambda: not follower.failing)
    await catalog.apply_policy(parse_policy(POLICY.format(name="second")), "2")
    await until(lambda: cached.version > row["version"])
    assert SUPERVISOR.failures["catalog_follower"] == failures, "an empty table is an error that is expected"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def charged(store: RedisCounters, limits: LimitSet) -> Decision | None:
    try:
        (outcome,) = await store.charge([Charge(((limits, "s"),), 1)])
    except StoreUnavailable:
        return None
    return outcome if isinstance(outcome, Decision) else None


async def answers(store: RedisCounters, limits: LimitSet) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await charged(store, limits) is None:
            await asyncio.sleep(0.02)


def renamed(host: bytes) -> Callable[[bytes], bytes]:
    """Puts another host into what a server says of others."""

    def rewrite(piece: bytes) -> bytes:
        return piece.replace(b"$9\r\n127.0.0.1\r\n", b"$%d\r\n%b\r\n" % (len(host), host))

    return rewrite


@pytest.mark.parametrize(
    "host", [b"a..b", b"x" * 64, b"\xff\xfe", b"a b"], ids=["empty label", "long label", "no UTF-8", "space"]
)
async def test_a_cluster_whose_map_names_hosts_that_are_none(redis_cluster: RedisCluster, host: bytes) -> None:
    """The resolver raises `UnicodeError`, which once ended the connections for good."""
    async with TcpProxy(redis_cluster.masters()[0].port) as proxy:
        proxy.rewrite = renamed(host)
        store = RedisCounters(f"redis+cluster://127.0.0.1:{proxy.port}", timeout_s=2)
        await store.start()
        limits = LimitSet(f"background:{host!r}", Algorithm.FIXED_WINDOW, [Limit.parse("1000/hour")])
        assert await charged(store, limits) is None
        proxy.rewrite = None
        await answers(store, limits)
        await store.close()


@pytest.mark.parametrize("host", [b"a..b", b"\xff\xfe"], ids=["empty label", "no UTF-8"])
async def test_sentinels_that_name_a_host_that_is_none(redis_sentinel: RedisSentinel, host: bytes) -> None:
    async with TcpProxy(redis_sentinel.sentinels[0].port) as proxy:
        proxy.rewrite = renamed(host)
        store = RedisCounters(f"redis+sentinel://127.0.0.1:{proxy.port}/{NAME}", timeout_s=2)
        await store.start()
        limits = LimitSet(f"background:{host!r}", Algorithm.FIXED_WINDOW, [Limit.parse("1000/hour")])
        assert await charged(store, limits) is None
        proxy.rewrite = None
        await answers(store, limits)
        await store.close()
