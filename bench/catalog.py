"""What it costs to find out whose a key is: from memory, from the cache that instances share, from PostgreSQL; alone and mixed.

    python -m bench.catalog [--smoke]

A PostgreSQL and a Redis on loopback; keys by the ten thousand in 20 tiers. Four parts:

1. one look-up at each level, one after the other: wall time and CPU of this process
2. a Zipf workload over keys of which memory holds a fifth, as the requirement has it: how many look-ups each level answers, and
   how much faster all of it is than asking the database each time; on loopback one after the other, and 32 at once with Redis
   1 ms and PostgreSQL 20 ms away (a proxy delays each answer)
3. a cold start: 5,000 distinct keys a second, memory empty, the shared cache warm, then cold; and what reaches the database
4. a thousand who ask for one key at once
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import itertools
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import NamedTuple

import uvloop
from tests.servers.postgres import PostgresServer
from tests.servers.tcp_proxy import TcpProxy

from bench.measure import Goal, asked_for_smoke, report
from bench.redis_server import redis_server
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.shared import SharedCatalog
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.database import DatabaseOptions
from tidegate.counters.redis.store import RedisCounters
from tidegate.policy.toml_reader import parse_policy

TIERS = 20
RULES = 50
IN_FLIGHT = 32
FAR_REDIS_S, FAR_POSTGRES_S = 0.001, 0.020
Figures = list[tuple[str, float, Goal | None]]


class Stack(NamedTuple):
    """The catalog at its levels."""

    database: SqlCatalog
    store: RedisCounters
    keys: Sequence[str]

    def shared(self) -> SharedCatalog:
        return SharedCatalog(self.database, self.store, b"secret of a bench")

    def cached(self, max_keys: int = 100_000) -> tuple[CachedCatalog, SharedCatalog]:
        shared = self.shared()
        return CachedCatalog(shared, max_keys=max_keys), shared


def fill(server: PostgresServer, count: int) -> list[str]:
    """Make keys by plain SQL; returns their digests."""
    digests = [hashlib.sha256(f"bench-key-{number:012}".encode()).hexdigest() for number in range(count)]
    server.execute(
        "INSERT INTO api_keys (id, sha256, tier_id, name, status, overrides, created_at_us, managed_by_file) "
        "SELECT left(d, 24), d, (SELECT id FROM tiers ORDER BY id OFFSET n %% %s LIMIT 1), '', 'active', '[]', 0, false "
        "FROM (SELECT n, encode(sha256(convert_to('bench-key-' || lpad(n::text, 12, '0'), 'UTF8')), 'hex') AS d "
        "FROM generate_series(0, %s) AS n) AS made",
        parameters=(TIERS, count - 1),
    )
    server.execute("ANALYZE api_keys")
    return digests


def policy() -> str:
    """A policy of some size."""
    rules = "".join(f'[[tiers.rules]]\nendpoint = "/api/v{n}/*"\nlimits = ["{n + 1}/s", "1000/hour"]\n' for n in range(RULES))
    return "".join(f'[[tiers]]\nname = "tier{number}"\nlimits = ["100000/day"]\n{rules}' for number in range(TIERS))


async def one_after_the_other(look_up: Callable[[str], Awaitable[object]], keys: Sequence[str]) -> tuple[float, float]:
    """Median wall µs and CPU µs of one look-up."""
    taken = []
    cpu = time.process_time()
    for key in keys:
        started = time.perf_counter()
        await look_up(key)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken) * 1e6, (time.process_time() - cpu) / len(keys) * 1e6


async def levels(stack: Stack, count: int) -> Figures:
    keys = stack.keys[:count]
    database = await one_after_the_other(stack.database.api_key, keys)
    shared = stack.shared()
    for key in keys:
        await shared.api_key(key)
    await shared.settle()
    level_two = await one_after_the_other(shared.api_key, keys)
    assert shared.hits == count, "every one of the second round is a hit"
    cached, _ = stack.cached()
    for key in keys:
        await cached.caller(key)
    rounds = [await one_after_the_other(cached.caller, keys) for _ in range(5)]
    level_one = statistics.median(wall for wall, _ in rounds), statistics.median(cpu for _, cpu in rounds)
    return [
        ("L1 hit, memory, µs", level_one[0], Goal(at_most=5)),
        ("L1 hit, µs CPU", level_one[1], Goal(at_most=5)),
        ("L2 hit, Redis, µs", level_two[0], None),
        ("L2 hit, µs CPU", level_two[1], None),
        ("database, PostgreSQL, µs", database[0], None),
        ("database, µs CPU", database[1], None),
        ("database to L1, ratio of wall times", database[0] / level_one[0], None),
        ("database to L2, ratio of wall times", database[0] / level_two[0], None),
    ]


async def in_turns(look_up: Callable[[str], Awaitable[object]], keys: Sequence[str], in_flight: int) -> float:
    """Mean ms that one look-up takes."""
    waiting = iter(keys)
    total = 0.0

    async def take_turns() -> None:
        nonlocal total
        for key in waiting:
            started = time.perf_counter()
            await look_up(key)
            total += time.perf_counter() - started

    await asyncio.gather(*(take_turns() for _ in range(in_flight)))
    return total / len(keys) * 1e3


async def mixed(stack: Stack, workload: Sequence[str], alone: int, where: str, in_flight: int) -> Figures:
    """The workload with both caches, and a part of it by the database alone."""
    database_ms = await in_turns(stack.database.api_key, workload[:alone], in_flight)
    cached, shared = stack.cached(max_keys=len(stack.keys) // 5)
    mixed_ms = await in_turns(cached.caller, workload, in_flight)
    await shared.settle()
    found = cached.hits + cached.misses
    # A miss of memory asks for the key alone: its tier is in memory but for the first time.
    return [
        (f"{where}: answered by L1, %", cached.hits / found * 100, None),
        (f"{where}: answered by L2, %", shared.hits / found * 100, None),
        (f"{where}: answered by the database, %", shared.misses / found * 100, None),
        (f"{where}: mean of a look-up, ms", mixed_ms, None),
        (f"{where}: mean by the database alone, ms", database_ms, None),
        (f"{where}: faster than the database alone, ratio", database_ms / mixed_ms, Goal(at_least=10)),
    ]


async def cold_start(stack: Stack, rate: int, seconds: float, label: str) -> Figures:
    """Distinct keys at a steady rate against an empty memory."""
    gc.collect()
    gc.freeze()  # as a server does once it has started
    cached, shared = stack.cached()
    for tier in range(TIERS):
        await cached.tier(f"tier{tier}")
    queries = stack.database.database.queries
    taken: list[float] = []
    loop = asyncio.get_running_loop()

    async def ask(key: str, due: float) -> None:
        await cached.caller(key)
        # From when it was due: what waits in the loop is part of what a client sees.
        taken.append(loop.time() - due)

    # Not kept beyond their end: a server does not either, and the collector would look at all of them.
    tasks: set[asyncio.Task[None]] = set()
    started = loop.time()
    for number, key in enumerate(stack.keys[: round(rate * seconds)]):
        due = started + number / rate
        if due > loop.time():
            await asyncio.sleep(due - loop.time())
        task = asyncio.ensure_future(ask(key, due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    took = loop.time() - started
    await shared.settle()
    taken.sort()
    goal = Goal(at_most=10) if label == "warm" else None
    return [
        (f"cold start, L2 {label}: distinct keys a second", len(taken) / took, None),
        (f"cold start, L2 {label}: median, ms", taken[len(taken) // 2] * 1e3, None),
        (f"cold start, L2 {label}: 99th percentile, ms", taken[len(taken) * 99 // 100] * 1e3, goal),
        (f"cold start, L2 {label}: queries a second at the database", (stack.database.database.queries - queries) / took, None),
    ]


async def stampede(stack: Stack, key: str) -> Figures:
    cached, _ = stack.cached()
    await stack.store.call(b"x", "FLUSHALL")
    queries = stack.database.database.queries
    await asyncio.gather(*(cached.caller(key) for _ in range(1000)))
    # One for the key and one for its tier.
    return [("1,000 at once for one key: queries", float(stack.database.database.queries - queries), Goal(at_most=2))]


@contextlib.asynccontextmanager
async def opened(postgres: str, redis: str, keys: Sequence[str]) -> AsyncIterator[Stack]:
    database = await SqlCatalog.open(postgres, DatabaseOptions(timeout_s=10))
    store = RedisCounters(redis, timeout_s=1.0)
    await store.start()
    try:
        yield Stack(database, store, keys)
    finally:
        await database.close()
        await store.close()


def zipf(keys: Sequence[str], count: int, exponent: float) -> list[str]:
    """Look-ups of keys whose popularity falls with the power of their rank."""
    weights = list(itertools.accumulate(1 / (rank + 1) ** exponent for rank in range(len(keys))))
    return random.Random(4).choices(keys, cum_weights=weights, k=count)


async def main() -> None:
    smoke = asked_for_smoke(__doc__)
    count, rate, seconds = (2_000, 1_000, 1.0) if smoke else (25_000, 5_000, 5.0)
    figures: Figures = []
    with PostgresServer() as server, redis_server() as redis:
        catalog = await SqlCatalog.open(server.url())
        await catalog.apply_policy(parse_policy(policy()), "bench")
        await catalog.close()
        keys = fill(server, count)
        popular = keys[: count * 2 // 5]
        workload = zipf(popular, len(popular) * 20, 1.0)
        async with opened(server.url(), redis.url, keys) as stack:
            figures += await levels(stack, 200 if smoke else 2_000)
            redis.client.flushall()
            figures += await cold_start(stack, rate, seconds, "cold")
            figures += await cold_start(stack, rate, seconds, "warm")
            redis.client.flushall()
            figures += await stampede(stack, keys[0])
            redis.client.flushall()
            figures += await mixed(stack._replace(keys=popular), workload, len(popular) // 2, "loopback", 1)
        redis.client.flushall()
        async with TcpProxy(server.port) as far_postgres, TcpProxy(int(redis.url.rpartition(":")[2].split("/")[0])) as far_redis:
            url = server.url().replace(f":{server.port}/", f":{far_postgres.port}/")
            async with opened(url, f"redis://127.0.0.1:{far_redis.port}", popular) as stack:
                far_postgres.delay_s, far_redis.delay_s = FAR_POSTGRES_S, FAR_REDIS_S
                figures += await mixed(stack, workload, max(len(popular) // 20, 100), "far", IN_FLIGHT)
    report("catalog", f"Who a key belongs to, {count:,} keys, {TIERS} tiers of {RULES} rules", figures, smoke=smoke)


if __name__ == "__main__":
    uvloop.run(main())
