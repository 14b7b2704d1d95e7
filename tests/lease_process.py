"""A process whose counters are leased: `python -m tests.lease_process URL PROCESSES CASE...`, a case being
`ALGORITHM|NAME|AMOUNT|LIMIT`.

Connects, prints `ready`, waits for a line, then for each case checks its share of twice the limit, 64 checks at a time, and goes
on until one is denied: so none stops with units in hand. Prints as JSON how many were allowed and degraded, and how many charges
were sent to the store.
"""

from __future__ import annotations

import asyncio
import json
import sys

from tidegate.counters import Charge
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.leased import LeasedCounters
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Decision
from tidegate.policy.limits import Algorithm, Limit, LimitSet

CONCURRENT = 64


async def main(url: str, processes: str, *cases: str) -> None:
    guarded = GuardedCounters(RedisCounters(url, timeout_s=20.0))
    store = LeasedCounters(guarded)
    await guarded.start()
    for algorithm in {case.split("|")[0] for case in cases}:
        warm = ((LimitSet("warm", Algorithm(algorithm), [Limit.parse("1000/minute")]), "warm"),)
        while not guarded.grants(warm):
            await store.charge((Charge(warm),))
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    results = []
    for case in cases:
        algorithm, name, amount, limit = case.split("|")
        limits = LimitSet(name, Algorithm(algorithm), [Limit.parse(limit)])
        left = max(2 * int(amount) // int(processes), CONCURRENT)
        allowed = degraded = denied = 0
        calls = guarded.store_calls

        async def worker(limits: LimitSet = limits) -> None:
            nonlocal left, allowed, degraded, denied
            while left > 0 or not denied or store.table.unused(limits, "s"):
                left -= 1
                [outcome] = await store.charge((Charge(((limits, "s"),)),))
                assert isinstance(outcome, Decision)
                allowed += outcome.allowed
                degraded += outcome.degraded
                denied += not outcome.allowed
                # A check that memory decides does not suspend: the others get their turn.
                await asyncio.sleep(0)

        await asyncio.gather(*(worker() for _ in range(CONCURRENT)))
        results.append((allowed, degraded, guarded.store_calls - calls))
    print(json.dumps(results), flush=True)
    await store.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
