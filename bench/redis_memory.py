"""What a live key costs Redis, by algorithm.

    python -m bench.redis_memory [--smoke]

A million subjects with the ids of API keys, one check each, on a limit of one window and on one of three; the growth of
`used_memory` over the number of keys, which includes the expiry's entry and the tables, and MEMORY USAGE of one key. Then the
log: bytes of an entry. Cluster mode is on: it costs 16 bytes a key more.
"""

from __future__ import annotations

import uvloop

from bench.measure import Goal, asked_for_smoke, report
from bench.redis_server import BenchRedis, info, redis_server
from tidegate.counters import Charge
from tidegate.counters.redis.store import RedisCounters
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import Algorithm, Limit, LimitSet

PIECE = 500
THREE = {
    # No key may expire while a million are charged.
    True: ("100/day burst 20", "1000/7d burst 100", "10000/month burst 1000"),
    False: ("100/day", "1000/7d", "10000/month"),
}


async def fill(server: BenchRedis, limits: LimitSet, keys: int, each: int = 1, beginning: str = "k:") -> None:
    """Charge `keys` subjects `each` times."""
    store = RedisCounters(server.url.replace("redis://", "redis+cluster://"), timeout_s=10)
    await store.start()
    for _ in range(each):
        for start in range(0, keys, PIECE):
            # All subjects have the length of those by API key.
            numbers = (f"{number * 2654435761 % 2**96:024x}"[len(beginning) - 2 :] for number in range(start, start + PIECE))
            charges = [Charge(((limits, beginning + number),)) for number in numbers]
            for outcome in await store.charge(charges):
                if isinstance(outcome, StoreUnavailable) or not outcome.allowed:
                    raise RuntimeError(f"a check was not charged: {outcome}")
    await store.close()


def measured(server: BenchRedis, limits: LimitSet, keys: int, each: int = 1, beginning: str = "k:") -> tuple[float, float]:
    """Bytes a key by the growth of used_memory, and by MEMORY USAGE of one of them."""
    server.client.flushall()
    before = int(info(server, "memory")["used_memory"])
    uvloop.run(fill(server, limits, keys, each, beginning))
    stored = int(server.client.dbsize())  # type: ignore[arg-type]
    if stored != keys:
        raise RuntimeError(f"{stored} keys are stored, {keys} were charged")
    grown = (int(info(server, "memory")["used_memory"]) - before) / keys
    key = server.client.randomkey()
    return grown, float(server.client.memory_usage(key) or 0)  # type: ignore[arg-type]


def main() -> None:
    smoke = asked_for_smoke(__doc__)
    keys = 2_000 if smoke else 1_000_000
    figures: list[tuple[str, float, Goal | None]] = []
    with redis_server(cluster=True) as server:
        for algorithm in Algorithm:
            goal = None if algorithm is Algorithm.SLIDING_LOG else Goal(at_most=180)
            for windows in (1, 3):
                texts = THREE[algorithm.is_bucket][:windows]
                limits = LimitSet(f"bench:{windows}", algorithm, [Limit.parse(text) for text in texts])
                grown, usage = measured(server, limits, keys)
                # The goal is of a key of one window; three are printed beside it.
                figures.append((f"{algorithm}, {windows} window(s), bytes a key", grown, goal if windows == 1 else None))
                figures.append((f"{algorithm}, {windows} window(s), MEMORY USAGE", usage, None))
        # Ids of API keys are packed into 16 characters; other subjects are stored as they are.
        plain = LimitSet("bench:1", Algorithm.SLIDING_WINDOW, [Limit.parse("100/day")])
        by_attribute, _ = measured(server, plain, keys, beginning="a:user=")
        figures.append(("sliding_window, 1 window, a subject by attribute of 26 characters, bytes a key", by_attribute, None))
        log = LimitSet("bench:log", Algorithm.SLIDING_LOG, [Limit.parse("100000/day")])
        entries, subjects = (20, PIECE) if smoke else (1_000, PIECE)
        grown, _ = measured(server, log, subjects, entries)
        figures.append((f"sliding_log, bytes an entry, logs of {entries}", grown / entries, Goal(at_most=24)))
    report("redis_memory", f"{keys:,} live keys in Redis, cluster mode", figures, smoke=smoke)


if __name__ == "__main__":
    main()
