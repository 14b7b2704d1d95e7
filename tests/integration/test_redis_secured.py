"""Passwords on every topology: the servers' own, and the sentinels'."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.servers.redis_cluster import RedisCluster
from tests.servers.redis_sentinel import RedisSentinel
from tidegate.counters import Charge
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import Algorithm, Limit, LimitSet


async def allowed(url: str, asks: int) -> int | str:
    """How many of some checks of one subject are allowed under 5 a day; why none is, where Redis cannot be had."""
    store = RedisCounters(url, timeout_s=2)
    await store.start()
    limits = LimitSet("secured", Algorithm.SLIDING_WINDOW, [Limit.parse("5/day")])
    try:
        outcomes = [(await store.charge([Charge(((limits, f"subject {number % 3}"),))]))[0] for number in range(asks)]
        failed = [outcome for outcome in outcomes if isinstance(outcome, StoreUnavailable)]
        if failed:
            return failed[0].message + "".join(connection.down_reason for connection in store.connections())
        return sum(outcome.allowed for outcome in outcomes if isinstance(outcome, Decision))
    finally:
        await store.close()


async def test_a_cluster_with_a_password(new_cluster: Callable[..., RedisCluster]) -> None:
    cluster = new_cluster(masters=3, replicas=0, options={"requirepass": "p@ss/word"})
    assert await allowed(cluster.url.replace("://", "://:p%40ss%2Fword@"), 30) == 15
    refused = await allowed(cluster.url.replace("://", "://:wrong@"), 1)
    assert isinstance(refused, str)
    assert "wrong@" not in refused


@pytest.mark.parametrize("sentinel_password", ["", "s3ntinel"])
async def test_sentinels_and_servers_with_passwords(new_sentinel: Callable[..., RedisSentinel], sentinel_password: str) -> None:
    sentinel = new_sentinel(
        options={"requirepass": "pw", "masterauth": "pw"},
        sentinel_options={"requirepass": sentinel_password} if sentinel_password else None,
    )
    query = f"?sentinel_password={sentinel_password}" if sentinel_password else ""
    assert await allowed(sentinel.url.replace("://", "://:pw@") + query, 30) == 15
    if sentinel_password:
        refused = await allowed(sentinel.url.replace("://", "://:pw@"), 1)
        assert isinstance(refused, str)
        assert "no sentinel can be reached" in refused
