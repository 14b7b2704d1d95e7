"""A user with exactly the permissions that docs/redis.md lists: everything works, and nothing connects again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.moments import until
from tests.servers.redis_cluster import RedisCluster
from tests.servers.redis_sentinel import RedisSentinel
from tests.servers.redis_server import RedisServer
from tests.servers.tcp_proxy import TcpProxy
from tidegate.counters import Charge
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.redis.channel import RedisChannel
from tidegate.counters.redis.instances import InstanceState, InstanceStates
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import Algorithm, Limit, LimitSet

DOCS = Path(__file__).parents[2] / "docs" / "redis.md"
USER = next(line.split() for line in DOCS.read_text().splitlines() if line.startswith("ACL SETUSER tidegate"))
TIMEOUT_S = 5.0


async def everything(url: str) -> list[str]:
    """Do all that Tidegate does on Redis; gives the addresses of the connections, to find out whether they last."""
    counters = GuardedCounters(RedisCounters(url, TIMEOUT_S))
    await counters.start()
    channel, heard = RedisChannel(counters.store), asyncio.Event()
    listening = asyncio.ensure_future(channel.listen(heard.set))
    try:
        sets = [LimitSet(f"acl:{algorithm}", algorithm, [Limit.parse("2/day")]) for algorithm in Algorithm]
        for _ in range(3):
            outcomes = await counters.charge([Charge(((limits, f"s{number}"),)) for limits in sets for number in range(3)])
            assert all(isinstance(outcome, Decision) and not outcome.degraded for outcome in outcomes), outcomes
        for limits in sets:
            counters._local.owe(Charge(((limits, "debtor"),)), counters._store_now_us())
        await until(lambda: not counters.owed)
        for shard in counters.store.shards():
            await counters.store.probe(shard, 1)
        await counters.reset([(limits, "s0") for limits in sets])
        await until(lambda: channel.connected)
        heard.clear()
        await channel.announce(7)
        await until(heard.is_set)
        assert await counters.store.call(b"x", "SET", b"tgc:{x}y", b"1", "PX", "1000") == b"OK"
        assert await counters.store.call(b"x", "GET", b"tgc:{x}y") == b"1"
        states = InstanceStates(counters.store, lambda: InstanceState("one", "", "", 1, ""))
        await states.exchange()
        assert [each.name for each in states.known] == ["one"]
        await states.leave()
        await counters.ping()
        assert not counters.degraded
        assert all(connection.up and connection._failed_attempts == 0 for connection in counters.store.connections())
        return [str(connection.endpoint) for connection in counters.store.connections()]
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await counters.close()


async def test_the_documented_user_may_do_everything(any_redis: RedisServer) -> None:
    any_redis.must(*USER)
    any_redis.must("ACL", "LOG", "RESET")
    before = int(any_redis.facts("INFO", "stats")["total_connections_received"])
    await everything(any_redis.url.replace("redis://", "redis://tidegate:password@"))
    assert any_redis.must("ACL", "LOG") == []
    assert int(any_redis.facts("INFO", "stats")["total_connections_received"]) - before == 2, "one for calls, one that listens"
    any_redis.must("ACL", "DELUSER", "tidegate")


async def test_on_a_cluster(redis_cluster: RedisCluster) -> None:
    for node in redis_cluster.nodes:
        node.must(*USER)
    await everything(redis_cluster.url.replace("://", "://tidegate:password@"))
    for node in redis_cluster.nodes:
        assert node.must("ACL", "LOG") == []
        node.must("ACL", "DELUSER", "tidegate")


async def test_with_sentinels(new_sentinel: Callable[..., RedisSentinel]) -> None:
    sentinel = new_sentinel()
    for node in sentinel.servers:
        node.must(*USER)
    await everything(sentinel.url.replace("://", "://tidegate:password@"))


@pytest.mark.parametrize("missing", ["+subscribe", "&tg:catalog"])
async def test_a_rejected_subscription_reports_what_is_missing_and_is_not_repeated_at_once(
    any_redis: RedisServer, missing: str, caplog: pytest.LogCaptureFixture
) -> None:
    any_redis.must(*(word for word in USER if word != missing))
    store = RedisCounters(any_redis.url.replace("redis://", "redis://tidegate:password@"), TIMEOUT_S)
    await store.start()
    before = int(any_redis.facts("INFO", "stats")["total_connections_received"])
    channel = RedisChannel(store)
    listening = asyncio.ensure_future(channel.listen(lambda: None))
    await until(lambda: channel._connection is not None and channel._connection._failed_attempts >= 4)
    assert not channel.connected
    # Pauses of 50, 100, 200, 400 ms …: a connection for each, and one warning for all of them.
    assert channel._connection is not None
    attempts = int(any_redis.facts("INFO", "stats")["total_connections_received"]) - before
    assert attempts <= channel._connection._failed_attempts + 1
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "+subscribe and &tg:catalog" in warnings[0]
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    await store.close()
    any_redis.must("ACL", "DELUSER", "tidegate")


async def test_a_server_that_greets_and_closes_is_not_hammered(redis_server: RedisServer) -> None:
    async with TcpProxy(redis_server.port) as proxy:
        store = RedisCounters(proxy.url, TIMEOUT_S)
        await store.start()
        pauses = 0

        def connected() -> bool:
            nonlocal pauses
            connection = store.connections()[0]
            if connection.up:
                proxy.drop_all()
            pauses = connection._failed_attempts
            return pauses >= 5

        await until(connected)
        # One more pause after each loss, though each connection was greeted in between.
        assert proxy.connections <= pauses + 1
        with pytest.raises(StoreUnavailable):
            await store.ping()
        await store.close()
