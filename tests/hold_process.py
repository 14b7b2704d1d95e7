"""Opens holds at a Redis, many at once, settles some, and ends without a word about the others.

    python -m tests.hold_process URL LIMIT SUBJECT HOLDS SETTLED TTL_S

Answers a line `ready`, waits for a line, then opens `HOLDS` holds of 10 units at once, settles `SETTLED` of those that were
allowed with 4 units, and answers a line with how many were allowed.
"""

from __future__ import annotations

import asyncio
import sys

from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.redis.store import RedisCounters
from tidegate.policy.limits import Algorithm, Limit, LimitSet


async def main(url: str, limit: str, subject: str, holds: int, settled: int, ttl_s: int) -> None:
    store = GuardedCounters(RedisCounters(url, timeout_s=30.0))
    await store.start()
    counters = ((LimitSet("hold_process", Algorithm.FIXED_WINDOW, [Limit.parse(limit)]), subject),)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    opened = await asyncio.gather(*(store.open_hold(counters, 10, ttl_s * 1_000_000) for _ in range(holds)))
    allowed = [hold for decision, hold in opened if hold is not None and not decision.degraded]
    await asyncio.gather(*(store.settle_hold(hold, 4) for hold in allowed[:settled]))
    print(len(allowed), flush=True)
    await asyncio.to_thread(sys.stdin.readline)


if __name__ == "__main__":
    url, limit, subject, holds, settled, ttl_s = sys.argv[1:]
    asyncio.run(main(url, limit, subject, int(holds), int(settled), int(ttl_s)))
