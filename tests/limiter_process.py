"""A process with many concurrent checks: `python -m tests.limiter_process URL ALGORITHM LIMIT NAME COUNT`.

Connects, prints `ready`, waits for a line, checks, and prints how many were allowed and how many were degraded.
"""

from __future__ import annotations

import asyncio
import sys

from tidegate import Limiter
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.redis.store import RedisCounters


async def main(url: str, algorithm: str, limit: str, name: str, count: str) -> None:
    store = GuardedCounters(RedisCounters(url, timeout_s=5.0))
    limiter = Limiter(limit, algorithm=algorithm, counters=store, name=name)
    await limiter.check("someone else")
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    answers = await asyncio.gather(*(limiter.check("s") for _ in range(int(count))))
    print(sum(answer.allowed for answer in answers), sum(answer.degraded for answer in answers), flush=True)
    await limiter.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
