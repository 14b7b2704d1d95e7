"""A process whose callers wait: `python -m tests.waiting_process URL NAME LIMIT`.

Prints `ready`; then for each line that it reads it lets one more caller wait, and prints `place MOMENT` when that has its place
and `passed TIME` when it passes, both in seconds since the epoch. At the end of its input it waits for its callers and prints
`calls` with the number of charges and reservations that it sent to Redis.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

from tidegate import Limiter
from tidegate.counters.factory import guard_of
from tidegate.counters.reservations import Reservation


class Watched(Limiter):
    """Prints its places."""

    async def reserve(self, *arguments: Any, **named: Any) -> Reservation:
        place = await super().reserve(*arguments, **named)
        assert place.at is not None
        print("place", place.at.timestamp(), flush=True)
        return place


async def wait_once(limiter: Limiter) -> None:
    decision = await limiter.wait("job", at_most_s=3600)
    print("passed" if decision.allowed and not decision.degraded else "failed", time.time(), flush=True)


async def main(url: str, name: str, limit: str) -> None:
    async with Watched(limit, algorithm="token_bucket", name=name, counters=url) as limiter:
        guard = guard_of(limiter.counters)
        assert guard is not None
        await limiter.check("someone else")
        before = guard.store_calls
        print("ready", flush=True)
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        async with asyncio.TaskGroup() as callers:
            while await reader.readline():
                callers.create_task(wait_once(limiter))
        print("calls", guard.store_calls - before, flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
