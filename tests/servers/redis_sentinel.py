"""A master with replicas, and the sentinels that watch them."""

from __future__ import annotations

from typing import Any

import hiredis

from tests.moments import wait_until
from tests.servers.lifetime import Started
from tests.servers.redis_server import Kind, Options, RedisServer, stop_all

NAME = "mymaster"
FORM_S = 90.0


class RedisSentinel(Started):
    """Sentinels with a master and its replicas; a context manager that starts and stops all.

    Args:
        sentinels: 2 or more; two of them are the quorum, and more than half must run for a failover.
        replicas: 1 or more.
        down_after_ms: after how long a server that does not answer counts as down.
        kind: `redis` or `valkey`.
        options: more configuration directives for the master and the replicas; with `requirepass`, all of them use it.
        sentinel_options: more configuration directives for the sentinels.
        failover_timeout_ms: after how long another failover is tried; three times `down_after_ms`, 3 s at least, if None.

    Attributes:
        servers: the master of the beginning, then the replicas.
    """

    def __init__(
        self,
        sentinels: int = 3,
        replicas: int = 1,
        down_after_ms: int = 1000,
        kind: Kind = "redis",
        options: Options | None = None,
        sentinel_options: Options | None = None,
        failover_timeout_ms: int | None = None,
    ) -> None:
        shared = dict(options or {})
        password = shared.get("requirepass")
        if password is not None:
            shared.setdefault("masterauth", password)
        first = RedisServer(kind, shared)
        follow = {"replicaof": f"{first.host} {first.port}"}
        self.servers = [first, *(RedisServer(kind, follow | shared) for _ in range(replicas))]
        directives = [
            f"monitor {NAME} {first.host} {first.port} 2",
            f"down-after-milliseconds {NAME} {down_after_ms}",
            f"failover-timeout {NAME} {failover_timeout_ms or max(3000, 3 * down_after_ms)}",
            f"parallel-syncs {NAME} {replicas}",
            *([f"auth-pass {NAME} {password}"] if password is not None else []),
        ]
        watch: dict[str, Any] = {"sentinel": directives, **(sentinel_options or {})}
        self.sentinels = [RedisServer(kind, watch, sentinel=True) for _ in range(sentinels)]

    @property
    def url(self) -> str:
        """`redis+sentinel://127.0.0.1:P1,127.0.0.1:P2,…/mymaster`, all sentinels."""
        return f"redis+sentinel://{','.join(f'{sentinel.host}:{sentinel.port}' for sentinel in self.sentinels)}/{NAME}"

    def start(self) -> None:
        """Start all and wait until the replicas are in sync and the sentinels know them and each other.

        Raises:
            RuntimeError: if a process does not start.
            TimeoutError: if the sentinels do not find each other within 30 s.
        """
        try:
            # The replicas first: a sentinel asks a master for them when it starts and then only every 10 s.
            for server in self.servers:
                server.launch()
            for server in self.servers:
                server.wait_ready()
            wait_until(lambda: all(map(_in_sync, self.servers[1:])), FORM_S, "the replicas are in sync")
            for sentinel in self.sentinels:
                sentinel.launch()
            for sentinel in self.sentinels:
                sentinel.wait_ready()
            wait_until(
                lambda: all(map(self._knows_all, self.sentinels)), FORM_S, "the sentinels know the replicas and each other"
            )
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all processes, the sentinels first."""
        stop_all(self.sentinels)
        stop_all(self.servers)

    def master(self) -> RedisServer:
        """Ask the sentinels who the master is.

        Returns:
            The server that most of the sentinels that run name, which need not be up.

        Raises:
            LookupError: if no sentinel runs or they know no master.
        """
        ports = [port for port in map(self._named_by, self.sentinels) if port is not None]
        if not ports:
            raise LookupError("no sentinel that runs names a master")
        port = max(ports, key=ports.count)
        return next(server for server in self.servers if server.port == port)

    def failover(self) -> None:
        """Tell a sentinel to promote a replica although the master is well; returns before that has happened.

        Raises:
            RuntimeError: if it refuses, such as when one is under way.
        """
        next(sentinel for sentinel in self.sentinels if sentinel.alive).must("SENTINEL", "FAILOVER", NAME)

    def wait_master(self, not_port: int, timeout_s: float = 20.0) -> RedisServer:
        """Wait until every sentinel that runs names the same other master, and it says that it is one.

        Args:
            not_port: port of the master before.
            timeout_s: for how long to ask.

        Returns:
            The new master.

        Raises:
            TimeoutError: if there is none in time.
        """

        def promoted() -> bool:
            named = {self._named_by(sentinel) for sentinel in self.sentinels if sentinel.alive}
            if len(named) != 1 or named & {None, not_port}:
                return False
            master = self.master()
            return master.alive and bool(master.must("ROLE")[0] == b"master")

        wait_until(promoted, timeout_s, f"another master than the one on port {not_port}")
        return self.master()

    def _named_by(self, sentinel: RedisServer) -> int | None:
        if not sentinel.alive:
            return None
        reply = sentinel.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME)
        return int(reply[1]) if isinstance(reply, list) else None

    def _knows_all(self, sentinel: RedisServer) -> bool:
        reply = sentinel.call("SENTINEL", "MASTER", NAME)
        if isinstance(reply, hiredis.ReplyError):
            return False
        facts = dict(zip(reply[::2], reply[1::2], strict=True))
        return (
            facts[b"flags"] == b"master"
            and int(facts[b"num-slaves"]) == len(self.servers) - 1
            and int(facts[b"num-other-sentinels"]) == len(self.sentinels) - 1
        )


def _in_sync(replica: RedisServer) -> bool:
    role = replica.must("ROLE")
    return bool(role[0] == b"slave" and role[3] == b"connected")
