"""`SyncLimiter` on real servers: exact together with threads, processes and event loops, and while servers fail."""

from __future__ import annotations

import asyncio
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.moments import wait_until
from tests.servers.redis_cluster import RedisCluster
from tests.servers.redis_server import RedisServer
from tidegate import Limiter, RateLimitExceeded, StoreUnavailable, SyncLimiter, limit
from tidegate.breaker import BreakerOptions
from tidegate.counters.blocking_redis import BlockingRedis
from tidegate.counters.degraded import GuardOptions
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.redis.blocking import BlockingRedisCounters
from tidegate.counters.redis.keyspace import slot_of
from tidegate.counters.redis.store import RedisCounters
from tidegate.doors.stores import TIMEOUT_VARIABLE, close_shared

PATIENT_S = 20.0
"""Deadline of a check, s: servers of tests may wait for a core."""


def limiter(url: str, limits: str, name: str, timeout_s: float = PATIENT_S, on_failure: str = "local") -> SyncLimiter:
    store = BlockingRedis(BlockingRedisCounters(url, timeout_s), GuardOptions(breaker=BreakerOptions(2, 10.0, 0.1)))
    return SyncLimiter(limits, counters=store, name=name, on_failure=on_failure)


def admitted(checked: SyncLimiter, times: int, subject: str = "s") -> int:
    return sum(checked.check(subject).allowed for _ in range(times))


@pytest.mark.parametrize("topology", ["redis_server", "valkey_server", "redis_cluster", "redis_sentinel"])
def test_threads_and_an_event_loop_admit_exactly_the_limit(request: pytest.FixtureRequest, topology: str) -> None:
    server: Any = request.getfixturevalue(topology)
    allowed: list[int] = []

    async def beside() -> int:
        async with Limiter(
            "100/day", counters=GuardedCounters(RedisCounters(server.url, timeout_s=PATIENT_S)), name="together"
        ) as other:
            return sum([(await other.check("s")).allowed for _ in range(40)])

    with limiter(server.url, "100/day", "together") as checked:
        threads = [threading.Thread(target=lambda: allowed.append(admitted(checked, 40))) for _ in range(3)]
        for thread in threads:
            thread.start()
        allowed.append(asyncio.run(beside()))
        for thread in threads:
            thread.join()
        assert sum(allowed) == 100
        assert not checked.check("s").degraded
        assert [each.remaining for each in checked.check_many([(f"other {number}", 1) for number in range(60)])] == [99] * 60
        checked.reset("s")
        assert checked.check("s").remaining == 99


def test_several_limits_costs_and_long_subjects(redis_server: RedisServer) -> None:
    with limiter(redis_server.url, "5/minute", "costs") as checked:
        answers = [checked.check("u", cost) for cost in (4, 2, 1, 0)]
        assert [each.allowed for each in answers] == [True, False, True, True]
        assert checked.check("u", 9).retry_after is None
        assert [checked.check("x" * 5000).remaining for _ in range(2)] == [4, 3]


def in_child(url: str, name: str, out: Any) -> None:
    with limiter(url, "50/day", name) as own:
        out.put(admitted(own, 40))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_of_a_process_counts_too(redis_server: RedisServer, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    out = context.Queue()
    with limiter(redis_server.url, "50/day", method) as checked:
        assert admitted(checked, 5) == 5
        child = context.Process(target=in_child, args=(redis_server.url, method, out))
        child.start()
        here = admitted(checked, 40)
        there = out.get(timeout=60)
        child.join()
        assert 5 + here + there == 50


def test_a_forked_child_does_not_use_its_parents_sockets(redis_server: RedisServer) -> None:
    program = f"""
import os
from tidegate import SyncLimiter
from tidegate.counters.blocking_redis import BlockingRedis
from tidegate.counters.redis.blocking import BlockingRedisCounters
store = BlockingRedis(BlockingRedisCounters({redis_server.url!r}, {PATIENT_S}))
limiter = SyncLimiter("30/day", counters=store, name="forked")
limiter.check("s")
child = os.fork()
allowed = sum(limiter.check("s").allowed for _ in range(20))
if child == 0:
    os._exit(allowed)
_, status = os.waitpid(child, 0)
print(1 + allowed + os.waitstatus_to_exitcode(status))
"""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr) == ("30\n", "")


def test_a_limited_function_on_redis_in_both_kinds(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT_VARIABLE, str(round(PATIENT_S * 1000)))
    url = redis_server.url.replace("redis://", "async+redis://")

    @limit("3/day", key="user", scope="both", counters=url, on_failure="deny")
    def blocking(user: str) -> str:
        return user

    @limit("3/day", key="user", scope="both", counters=url, on_failure="deny")
    async def asynchronous(user: str) -> str:
        return user

    assert blocking("a") == "a"
    assert asyncio.run(asynchronous("a")) == "a"
    assert asyncio.run(asynchronous("a")) == "a", "in another event loop"
    with pytest.raises(RateLimitExceeded):
        blocking("a")
    with pytest.raises(RateLimitExceeded):
        asyncio.run(asynchronous("a"))
    assert blocking("b") == "b"
    asyncio.run(close_shared())


def test_while_redis_is_down_and_after(new_redis: Callable[[], RedisServer]) -> None:
    server = new_redis()
    checked = limiter(server.url, "10/day", "outage", timeout_s=1.0)
    denying = limiter(server.url, "10/day", "denying", timeout_s=1.0, on_failure="deny")
    allowing = limiter(server.url, "10/day", "allowing", timeout_s=1.0, on_failure="allow")
    assert [each.check("s").degraded for each in (checked, denying, allowing)] == [False] * 3
    server.stop()
    assert [(each.allowed, each.degraded) for each in (checked.check("s") for _ in range(6))] == [(True, True)] * 6
    with pytest.raises(StoreUnavailable):
        denying.check("s")
    assert all(allowing.check("s").allowed for _ in range(20))
    assert checked.counters.owed == 1  # type: ignore[attr-defined]
    server.start()
    back = wait_until(lambda: (decision := checked.check("t")) and not decision.degraded and decision)
    assert back.allowed
    assert wait_until(lambda: not checked.check("s", 0).degraded)
    # The server began anew, without the one check before the outage: the six during it were added.
    assert checked.check("s").remaining == 3
    for each in (checked, denying, allowing):
        each.close()


def test_slots_that_move(new_cluster: Callable[..., RedisCluster]) -> None:
    cluster = new_cluster(masters=3, replicas=0)
    with limiter(cluster.url, "1000/day", "moving") as checked:
        assert checked.check("s").remaining == 999
        slot = slot_of("s")
        owner = cluster.owner_of(slot)
        other = next(node for node in cluster.masters() if node.port != owner.port)
        cluster.begin_migration(slot, other)
        assert checked.check("s").remaining == 998
        cluster.move_keys(slot, other)
        assert checked.check("s").remaining == 997, "by ASK"
        cluster.finish_migration(slot, other)
        assert checked.check("s").remaining == 996, "by MOVED"
        assert not checked.check("s").degraded


@pytest.mark.parametrize(("url", "remedy"), [("redis+cluster", "is not a cluster node: use redis://")])
def test_a_wrong_topology_names_the_remedy(redis_server: RedisServer, url: str, remedy: str) -> None:
    store = BlockingRedisCounters(redis_server.url.replace("redis", url, 1), PATIENT_S)
    node = store._require_topology().connection_to(store.url.endpoints[0])
    with pytest.raises(StoreUnavailable, match=remedy):
        node.send(b"*1\r\n$4\r\nPING\r\n").result()
