"""CPU of the client per check on Redis, by the peers: redis-py with a script of one's own, and `limits` on redis-py.

    python -m bench.redis_peers URL

10,000 subjects take turns on 100,000/minute, so that every check is charged. CPU time is the process's own, under uvloop;
what Redis itself spends is not in it. redis-py parses with hiredis when it is installed, as it is here.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop
from limits import parse
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.asyncio import Redis

SCRIPT = Path(__file__).parent / "peers" / "sliding_window.lua"
LIMIT, WINDOW_MS = 100_000, 60_000
SUBJECTS = [f"user-{number}" for number in range(10_000)]


def redis_py_evalsha(url: str, calls: int, in_flight: int) -> float:
    """CPU µs of one EVALSHA of a sliding window script through redis-py.

    Args:
        url: of a Redis server, `redis://host:port/number`.
        calls: to measure, 1 or more.
        in_flight: calls that wait at the same time, 1 or more; redis-py opens a connection for each.

    Returns:
        CPU µs of this process per call.

    Raises:
        RuntimeError: when a check was denied, or from inside a running event loop.
        redis.RedisError: when the server cannot be reached or refuses.
    """

    async def measure() -> float:
        async with Redis.from_url(url) as redis:
            sha = await redis.script_load(SCRIPT.read_text())
            evalsha: Any = redis.evalsha  # its type is that of the blocking client too
            return await _per_call_us(
                lambda subject: evalsha(sha, 1, f"bench:redis-py:{subject}", LIMIT, WINDOW_MS), calls, in_flight
            )

    return uvloop.run(measure())


def limits_async(url: str, calls: int, in_flight: int) -> float:
    """CPU µs of one `limits.aio` `SlidingWindowCounterRateLimiter.hit` on redis-py.

    Args:
        url: of a Redis server, `redis://host:port/number`.
        calls: to measure, 1 or more.
        in_flight: calls that wait at the same time, 1 or more; redis-py opens a connection for each.

    Returns:
        CPU µs of this process per call.

    Raises:
        RuntimeError: when a check was denied, or from inside a running event loop.
        redis.RedisError: when the server cannot be reached or refuses.
    """

    async def measure() -> float:
        async with Redis.from_url(url) as redis:
            ours: dict[str, Any] = {"connection_pool": redis.connection_pool}  # a pool of its own it would never close
            limiter = SlidingWindowCounterRateLimiter(RedisStorage(f"async+{url}", implementation="redispy", **ours))
            item = parse(f"{LIMIT}/minute")
            return await _per_call_us(lambda subject: limiter.hit(item, subject), calls, in_flight)

    return uvloop.run(measure())


async def _per_call_us(check: Callable[[str], Awaitable[object]], calls: int, in_flight: int) -> float:
    """CPU µs of one awaited check; connections are opened and scripts loaded before the clock starts."""
    await _check_all(check, 20 * in_flight, in_flight)
    started = time.process_time()
    await _check_all(check, calls, in_flight)
    return (time.process_time() - started) / calls * 1e6


async def _check_all(check: Callable[[str], Awaitable[object]], calls: int, in_flight: int) -> None:
    numbers = iter(range(calls))  # shared: each takes the next when it is done with its own

    async def take_turns() -> None:
        for number in numbers:
            if not await check(SUBJECTS[number % len(SUBJECTS)]):
                raise RuntimeError(f"check {number} was denied: the figure would be of another path; flush the Redis first")

    await asyncio.gather(*(take_turns() for _ in range(in_flight)))  # not a TaskGroup: the caller gets the error, not a group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", metavar="URL", help="of a Redis server that the bench may write to, redis://host:port/number")
    parser.add_argument("--calls", type=int, default=50_000, help="calls to measure of each (default: 50000)")
    parser.add_argument("--in-flight", type=int, default=64, help="calls that wait at the same time (default: 64)")
    options = parser.parse_args()
    for name, measured in (("redis-py, EVALSHA", redis_py_evalsha), ("limits on redis-py, hit", limits_async)):
        print(f"{name:<24} {measured(options.url, options.calls, options.in_flight):8.1f} µs CPU")


if __name__ == "__main__":
    main()
