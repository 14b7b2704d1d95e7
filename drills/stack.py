"""The whole topology on loopback: instances behind HAProxy, their Redis and their PostgreSQL, with the configurations of deploy/.

`make stack` keeps one running in the background (`drills.stack_command`); drills run their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Self, TypeVar, get_args

import httpx
from tests.conftest import Serve
from tests.servers import deployed
from tests.servers.deployed_redis import redis_cluster, redis_sentinel, redis_standalone
from tests.servers.haproxy import HAProxy
from tests.servers.ports import HOST, free_port
from tests.servers.postgres_cluster import PostgresCluster, PostgresReplica
from tests.servers.postgres_failover import Keeper, PostgresFailover
from tests.servers.redis_cluster import RedisCluster
from tests.servers.redis_sentinel import RedisSentinel
from tests.servers.redis_server import RedisServer
from tests.servers.tcp_proxy import TcpProxy

T = TypeVar("T")
Topology = Literal["cluster", "sentinel", "standalone"]
TOPOLOGIES: Final[tuple[Topology, ...]] = get_args(Topology)
LOOK_S: Final = 2.0
"""How long one look at a server may take."""


class Sizes(NamedTuple):
    """How many of each.

    Args:
        instances: of Tidegate.
        shards: masters of a Redis Cluster, 3 or more; of no account elsewhere.
        redis_replicas: of each master; of no account where Redis stands alone.
        postgres_replicas: of the primary; of two or more pg_auto_failover promotes one where the primary dies.
    """

    instances: int = 3
    shards: int = 3
    redis_replicas: int = 1
    postgres_replicas: int = 2


class Piece(NamedTuple):
    """One server of the stack.

    Args:
        what: its kind and number.
        address: `HOST:PORT`.
    """

    what: str
    address: str
    pid: int

    @property
    def healthy(self) -> bool:
        """Whether it answers: instances and balancer that they are ready, Redis to PING, PostgreSQL by taking a connection."""
        try:
            if self.what.startswith(("tidegate", "haproxy")):
                path = "/readyz" if self.what.startswith("tidegate") else "/v1/usage"
                # The balancer itself answers 503 where it has no instance to ask.
                return httpx.get(f"http://{self.address}{path}", timeout=LOOK_S).status_code < 500
            host, port = self.address.split(":")
            with socket.create_connection((host, int(port)), LOOK_S) as asking:
                if self.what.startswith("postgres"):
                    return True
                asking.sendall(b"PING\r\n")
                return asking.recv(5) == b"+PONG"
        except (OSError, httpx.TransportError):
            return False


class Proxy:
    """A `TcpProxy` in a thread of its own: servers may then be reached through it while the caller's loop does other things.

    Args:
        target_port: where it leads.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        self._proxy = self._do(self._entered())
        self.port = self._proxy.port
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._do(self._proxy.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def delay(self, seconds: float) -> None:
        """Let replies come later from now on.

        Args:
            seconds: how much.
        """
        self._loop.call_soon_threadsafe(setattr, self._proxy, "delay_s", seconds)

    def _do(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(30)

    async def _entered(self) -> TcpProxy:
        return await TcpProxy(self._target_port).__aenter__()


class Stack:
    """The topology; a context manager that starts and ends all of it.

    Args:
        directory: an empty one, for the instances' files and logs.
        policy: text of the policy file of all instances.
        settings: environment of all instances, beside addresses.
        each: further environment of one instance each, in their order.
        proxied: whether a Redis that stands alone is reached through `proxy`.
        progress: callback run whenever another process is ready.

    Attributes:
        url: of the balancer: what a client asks.
        instances: of Tidegate.
        proxy: before Redis, where there is one.
    """

    def __init__(
        self,
        directory: Path,
        policy: str,
        topology: Topology = "cluster",
        sizes: Sizes = Sizes(),  # noqa: B008 - never changes
        settings: Mapping[str, str] | None = None,
        each: Sequence[Mapping[str, str]] = (),
        proxied: bool = False,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        if proxied and topology != "standalone":
            raise ValueError(f"only a Redis that stands alone can be reached through one proxy, not a {topology}")
        self.directory = directory
        self.policy_file = directory / "tidegate.policy.toml"
        self.policy_file.write_text(policy)
        self.sizes = sizes
        self.redis: RedisCluster | RedisSentinel | RedisServer
        if topology == "cluster":
            self.redis = redis_cluster(sizes.shards, sizes.redis_replicas)
        elif topology == "sentinel":
            self.redis = redis_sentinel(3, sizes.redis_replicas)
        else:
            self.redis = redis_standalone()
        self.postgres: PostgresCluster | PostgresFailover
        if sizes.postgres_replicas > 1:
            self.postgres = PostgresFailover(sizes.postgres_replicas + 1)
        else:
            self.postgres = PostgresCluster(sizes.postgres_replicas)
        self.instances: list[Serve] = []
        self.proxy: Proxy | None = None
        self._settings, self._each = dict(settings or {}), list(each)
        self._proxied = proxied
        self._progress = progress
        self._haproxy: HAProxy | None = None
        self._running = contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._running.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._running.close()

    @property
    def url(self) -> str:
        """Of the balancer."""
        assert self._haproxy is not None
        return self._haproxy.url.rstrip("/")

    @property
    def cluster(self) -> RedisCluster:
        """The Redis Cluster."""
        assert isinstance(self.redis, RedisCluster)
        return self.redis

    @property
    def sentinel(self) -> RedisSentinel:
        """The Redis that sentinels watch."""
        assert isinstance(self.redis, RedisSentinel)
        return self.redis

    @property
    def standalone(self) -> RedisServer:
        """The one Redis."""
        assert isinstance(self.redis, RedisServer)
        return self.redis

    def redis_servers(self) -> list[RedisServer]:
        """All that hold counters; sentinels do not."""
        if isinstance(self.redis, RedisCluster):
            return list(self.redis.nodes)
        return list(self.redis.servers) if isinstance(self.redis, RedisSentinel) else [self.redis]

    def pieces(self) -> Iterator[Piece]:
        """What runs now, the balancer first."""
        if self._haproxy is not None:
            yield Piece("haproxy", f"{HOST}:{self._haproxy.port}", self._haproxy.pid)
        for number, instance in enumerate(self.instances, 1):
            yield Piece(f"tidegate {number}", f"{HOST}:{instance.port}", instance.process.pid)
            yield Piece(f"tidegate {number} admin", f"{HOST}:{instance.admin_port}", instance.process.pid)
        sentinels = self.redis.sentinels if isinstance(self.redis, RedisSentinel) else []
        for kind, servers in (("redis", self.redis_servers()), ("redis sentinel", sentinels)):
            for number, server in enumerate(servers, 1):
                if server.alive:
                    yield Piece(f"{kind} {number}", f"{server.host}:{server.port}", server.pid)
        yield from self._databases()

    def postgres_standbys(self) -> Sequence[Keeper | PostgresReplica]:
        """Servers of the catalog that take no writes at this moment."""
        if isinstance(self.postgres, PostgresCluster):
            return self.postgres.replicas
        primary = self.postgres.primary()
        return [each for each in self.postgres.nodes if each is not primary]

    def _databases(self) -> Iterator[Piece]:
        if isinstance(self.postgres, PostgresCluster):
            for number, server in enumerate(self.postgres.servers):
                if server.alive:
                    what = f"postgres replica {number}" if number else "postgres primary"
                    yield Piece(what, f"{server.host}:{server.port}", server.pid)
            return
        # Who of them is the primary changes: nodes, and their monitor.
        for keeper in (self.postgres.monitor, *self.postgres.nodes):
            if keeper.alive:
                yield Piece(f"postgres {keeper.name}", f"{HOST}:{keeper.port}", keeper.pid)

    def _start(self) -> None:
        # CheckResult before they start: they end what they have begun, also where the other one fails.
        self._running.callback(self.redis.stop)
        self._running.callback(self.postgres.stop)
        with ThreadPoolExecutor(2) as starting:
            for done in [starting.submit(self.redis.start), starting.submit(self.postgres.start)]:
                done.result()
        self._progress()
        if self._proxied:
            self.proxy = self._running.enter_context(Proxy(self.standalone.port))
        # The first one makes the tables.
        self._launch(0)
        self.instances[0].wait_ready()
        for number in range(1, self.sizes.instances):
            self._launch(number)
        # All at once: each takes a moment to drain.
        self._running.callback(self._tell_to_end)
        self._progress()
        for instance in self.instances[1:]:
            instance.wait_ready()
        balancer, _ = deployed.haproxy([each.port for each in self.instances], patient=False)
        self._haproxy = self._running.enter_context(balancer)
        self._progress()

    def _tell_to_end(self) -> None:
        for instance in self.instances:
            instance.process.terminate()

    def _launch(self, number: int) -> None:
        where = self.directory / f"tidegate{number + 1}"
        where.mkdir()
        counters = f"redis://{HOST}:{self.proxy.port}" if self.proxy is not None else self.redis.url
        environment = {
            "TIDEGATE_POLICY__FILE": str(self.policy_file),
            "TIDEGATE_COUNTERS__URL": counters,
            # Where a Redis is away from the start, no instance knows the others.
            "TIDEGATE_COUNTERS__MIN_INSTANCES": str(self.sizes.instances),
            "TIDEGATE_CATALOG__URL": self.postgres.url(),
            **self._settings,
            **(self._each[number] if number < len(self._each) else {}),
        }
        if self.sizes.postgres_replicas:
            environment["TIDEGATE_CATALOG__REPLICAS"] = ",".join(self.postgres.replica_urls())
        instance = Serve(where, (), free_port(), where / "tidegate.log", False, True, **environment)
        self._running.callback(instance.stop)
        self.instances.append(instance)
