"""What a check on Redis costs: CPU of the client beside its peers, of Redis beside INCRBY, and batches beside single calls.

    python -m bench.redis_calls [--smoke]

One Redis on loopback, on the other core. Client CPU is the process's own under uvloop, at 64 in flight over 10,000 subjects;
Redis CPU is that of EVALSHA and INCRBY in its INFO commandstats. Rounds are interleaved; medians are printed.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

import uvloop

from bench.measure import Goal, asked_for_smoke, report
from bench.redis_peers import SUBJECTS, limits_async, redis_py_evalsha
from bench.redis_server import BenchRedis, info, redis_server
from tidegate import Limiter
from tidegate.counters.factory import open_counters
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.redis.resp import encode_command
from tidegate.policy.limits import Algorithm
from tidegate.settings import CounterSettings

IN_FLIGHT = 64
BATCH = 100


async def _run(check: Callable[[str], Awaitable[object]], calls: int) -> tuple[float, float]:
    """CPU and wall µs of one awaited check at `IN_FLIGHT`."""
    numbers = iter(range(calls))

    async def take_turns() -> None:
        for number in numbers:
            await check(SUBJECTS[number % len(SUBJECTS)])

    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(take_turns() for _ in range(IN_FLIGHT)))
    return (time.process_time() - cpu) / calls * 1e6, (time.perf_counter() - started) / calls * 1e6


def limiter(url: str, algorithm: str) -> Limiter:
    """A limiter that none of the calls of a bench exhausts."""
    amount = 100_000 if algorithm == Algorithm.SLIDING_LOG else 1_000_000
    # The deadline is long, so that a busy machine makes a figure worse and does not decide checks without Redis.
    counters = open_counters(CounterSettings(url=url, timeout_ms=2000))
    return Limiter(f"{amount}/minute", counters=counters, algorithm=algorithm)


def own_calls(server: BenchRedis, algorithm: str, calls: int) -> tuple[float, float, float]:
    """Client CPU, wall and Redis CPU µs of one check."""

    async def measure() -> tuple[float, float]:
        own = limiter(server.url, algorithm)
        await _run(own.check, 20 * IN_FLIGHT)
        server.client.config_resetstat()
        measured = await _run(own.check, calls)
        _none_degraded(own)
        await own.close()
        return measured

    cpu_us, wall_us = uvloop.run(measure())
    return cpu_us, wall_us, _redis_us(server, "evalsha")


def incrby(server: BenchRedis, calls: int) -> tuple[float, float, float]:
    """The same of a bare INCRBY through the same connection: the least that a counter on Redis can cost."""

    async def measure() -> tuple[float, float]:
        own = limiter(server.url, Algorithm.FIXED_WINDOW)
        await own.check("warm")
        assert isinstance(own.counters, GuardedCounters)
        connection = own.counters.store.connections()[0]

        async def ask(subject: str) -> None:
            await connection.send(encode_command("INCRBY", f"bench:incrby:{subject}", "1"))

        server.client.config_resetstat()
        measured = await _run(ask, calls)
        await own.close()
        return measured

    cpu_us, wall_us = uvloop.run(measure())
    return cpu_us, wall_us, _redis_us(server, "incrby")


def batches(server: BenchRedis, calls: int) -> tuple[float, float, float, float]:
    """CPU and wall µs of a check in batches of 100, and of single calls one after the other."""

    async def measure() -> tuple[float, float, float, float]:
        own = limiter(server.url, Algorithm.SLIDING_WINDOW)
        await own.check("warm")
        asked = [[(subject, 1) for subject in SUBJECTS[start : start + BATCH]] for start in range(0, len(SUBJECTS), BATCH)]
        started, cpu = time.perf_counter(), time.process_time()
        for number in range(calls // BATCH):
            await own.check_many(asked[number % len(asked)])
        batch = (time.process_time() - cpu) / calls * 1e6, (time.perf_counter() - started) / calls * 1e6
        started, cpu = time.perf_counter(), time.process_time()
        for number in range(calls // 10):
            await own.check(SUBJECTS[number])
        alone = (time.process_time() - cpu) / calls * 1e7, (time.perf_counter() - started) / calls * 1e7
        _none_degraded(own)
        await own.close()
        return *batch, *alone

    return uvloop.run(measure())


def _none_degraded(own: Limiter) -> None:
    assert isinstance(own.counters, GuardedCounters)
    if own.counters.degraded:
        raise RuntimeError(f"checks were decided without Redis: {own.counters.degraded}; the figure would be of another path")


def _redis_us(server: BenchRedis, command: str) -> float:
    return float(info(server, "commandstats")[f"cmdstat_{command}"]["usec_per_call"])


def main() -> None:
    smoke = asked_for_smoke(__doc__)
    rounds, calls = (3, 2_000) if smoke else (5, 40_000)
    own: list[float] = []
    redis_py: list[float] = []
    limits: list[float] = []
    by_algorithm: dict[str, list[tuple[float, float, float]]] = {algorithm.value: [] for algorithm in Algorithm}
    bare: list[tuple[float, float, float]] = []
    batched: list[tuple[float, float, float, float]] = []
    with redis_server() as server:
        for _ in range(rounds):
            server.client.flushall()
            redis_py.append(redis_py_evalsha(server.url, calls, IN_FLIGHT))
            limits.append(limits_async(server.url, calls, IN_FLIGHT))
            bare.append(incrby(server, calls))
            for algorithm, measured in by_algorithm.items():
                measured.append(own_calls(server, algorithm, calls))
            own.append(by_algorithm["sliding_window"][-1][0])
            batched.append(batches(server, calls))
    middle = statistics.median
    figures: list[tuple[str, float, Goal | None]] = [
        ("Tidegate, Limiter.check, sliding window, client µs CPU", middle(own), Goal(at_most=12)),
        ("redis-py asyncio, one EVALSHA, client µs CPU", middle(redis_py), None),
        ("limits on redis-py, client µs CPU", middle(limits), None),
        ("ratio to redis-py", middle(a / b for a, b in zip(redis_py, own, strict=True)), Goal(at_least=8)),
        ("ratio to limits", middle(a / b for a, b in zip(limits, own, strict=True)), Goal(at_least=4)),
        ("INCRBY, client µs CPU", middle(each[0] for each in bare), None),
        ("INCRBY, wall µs", middle(each[1] for each in bare), None),
        ("INCRBY, Redis µs CPU", middle(each[2] for each in bare), None),
    ]
    for algorithm, measured in by_algorithm.items():
        for place, what in enumerate(("client µs CPU", "wall µs", "Redis µs CPU")):
            figures.append((f"{algorithm}, {what}", middle(each[place] for each in measured), None))
        for place, what in ((1, "wall"), (2, "Redis CPU")):
            ratios = [each[place] / base[place] for each, base in zip(measured, bare, strict=True)]
            figures.append((f"{algorithm}, ratio to INCRBY, {what}", middle(ratios), None))
    figures += [
        ("a check in a batch of 100, client µs CPU", middle(each[0] for each in batched), None),
        ("a check in a batch of 100, wall µs", middle(each[1] for each in batched), None),
        ("one call after the other, client µs CPU", middle(each[2] for each in batched), None),
        ("one call after the other, wall µs", middle(each[3] for each in batched), None),
        ("batch of 100 to single calls, client CPU", middle(each[2] / each[0] for each in batched), Goal(at_least=10)),
        ("batch of 100 to single calls, wall", middle(each[3] / each[1] for each in batched), Goal(at_least=10)),
    ]
    report("redis_calls", "A check on Redis, 64 in flight", figures, smoke=smoke)


if __name__ == "__main__":
    main()
