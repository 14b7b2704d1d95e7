"""Redis with the configurations of deploy/redis, but for ports, paths and passwords."""

from __future__ import annotations

from tests.servers.deployed import DEPLOY
from tests.servers.redis_cluster import RedisCluster
from tests.servers.redis_sentinel import NAME, RedisSentinel
from tests.servers.redis_server import Options, RedisServer

_OURS = ("port", "bind", "protected-mode")
"""What the starters say themselves."""


def directives(*names: str) -> Options:
    """Read a configuration of Redis.

    Args:
        names: of files in deploy/redis, in the order in which the server would read them.

    Returns:
        Their directives by name, but for those that the starters give; several of one name as a list.
    """
    found: dict[str, list[str]] = {}
    for file in names:
        for line in (DEPLOY / "redis" / file).read_text().splitlines():
            name, _, value = line.strip().partition(" ")
            if name and not name.startswith("#") and name not in _OURS:
                found.setdefault(name, []).append(value.strip())
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def redis_standalone() -> RedisServer:
    """One server with deploy/redis/redis.conf."""
    return RedisServer(options=directives("redis.conf"))


def redis_cluster(masters: int = 3, replicas: int = 1) -> RedisCluster:
    """A cluster whose nodes have deploy/redis/redis.conf and cluster.conf."""
    return RedisCluster(masters, replicas, options=directives("redis.conf", "cluster.conf"))


def redis_sentinel(sentinels: int = 3, replicas: int = 2) -> RedisSentinel:
    """Sentinels, a master and its replicas with deploy/redis/redis.conf and sentinel.conf."""
    said = directives("sentinel.conf")["sentinel"]
    assert isinstance(said, list)
    watched = {line.split()[0]: line.split()[-1] for line in said if f" {NAME} " in line}
    return RedisSentinel(
        sentinels,
        replicas,
        down_after_ms=int(watched["down-after-milliseconds"]),
        options=directives("redis.conf"),
        failover_timeout_ms=int(watched["failover-timeout"]),
    )
