"""What leases save: calls to the store, CPU of Redis and of the library, and latency with a Redis that is far away.

    python -m bench.leases [--smoke]

Each ratio is of one run, with and without leases or memory beside them. *Zipf*: 50 instances in one process, each with a
connection of its own, over one Redis; 100,000 subjects with exponent 1.1, limits of 1,000/minute; as many checks as the machine
makes in the time, the rate is printed beside. With affinity each subject is sent to one instance. *Hot*: one subject,
10,000,000/minute, over 4 instances; memory beside it. *Far*: 50 subjects behind a proxy that delays each way by half of 5 ms. A
store call is a charge, a request for a lease, or a lease given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import msgspec
import uvloop

from bench.http import interleaved, need_wrk, ours, ratio
from bench.measure import Goal, asked_for_smoke, report
from bench.redis_server import BenchRedis, redis_cpu_us, redis_server
from tidegate.counters import Charge
from tidegate.counters.degraded import GuardOptions
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.leased import LeasedCounters
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.redis.scripts import parameters, script
from tidegate.counters.redis.store import RedisCounters
from tidegate.policy.limits import Algorithm, Limit, LimitSet

INSTANCES, SUBJECTS, EXPONENT = 50, 100_000, 1.1
IN_FLIGHT = 64


class Workload(NamedTuple):
    """What a run did.

    Args:
        calls: to the store.
        redis_us: CPU of Redis per check, µs.
        rate: checks a second.
        leased: share decided from leases.
        first: share that is the first of a subject at an instance: each needs a call.
    """

    checks: int
    calls: int
    redis_us: float
    rate: float
    leased: float
    first: float


def _instances(url: str, count: int, leases: bool) -> list[Any]:
    guarded = [GuardedCounters(RedisCounters(url, timeout_s=2.0), GuardOptions(min_instances=count)) for _ in range(count)]
    return [LeasedCounters(each) for each in guarded] if leases else guarded


async def zipf(server: BenchRedis, seconds: float, *, leases: bool, affinity: bool) -> Workload:
    """Checks of subjects by a Zipf distribution, for a time."""
    chosen = random.Random(7)
    weights = list(accumulate(1 / rank**EXPONENT for rank in range(1, SUBJECTS + 1)))
    limits = LimitSet(f"zipf:{leases}:{affinity}", Algorithm.SLIDING_WINDOW, [Limit.parse("1000/minute")])
    counters = [((limits, f"u{number}"),) for number in range(SUBJECTS)]
    stores = _instances(server.url, INSTANCES, leases)
    numbers = chosen.choices(range(SUBJECTS), cum_weights=weights, k=200_000)
    checks = 0
    known: set[tuple[int, int]] = set()
    await asyncio.gather(*(store.charge([Charge(((limits, f"warm{place}"),), 1)]) for place, store in enumerate(stores)))
    calls = _calls(stores)
    cpu, started = redis_cpu_us(server), time.perf_counter()

    async def take_turns(turn: int) -> None:
        nonlocal checks
        at = turn
        while time.perf_counter() - started < seconds:
            number = numbers[at % len(numbers)]
            at += IN_FLIGHT
            place = number % INSTANCES if affinity else checks % INSTANCES
            store = stores[place]
            known.add((number, place))
            checks += 1
            await store.charge([Charge(counters[number])])
            if not at % 16:
                await asyncio.sleep(0)

    await asyncio.gather(*(take_turns(turn) for turn in range(IN_FLIGHT)))
    took = time.perf_counter() - started
    redis_us = (redis_cpu_us(server) - cpu) / checks
    calls = _calls(stores) - calls
    leased = sum(store.table.decisions for store in stores if isinstance(store, LeasedCounters))
    await asyncio.gather(*(store.close() for store in stores))
    return Workload(checks, calls, redis_us, checks / took, leased / checks, len(known) / checks)


def _calls(stores: Sequence[Any]) -> int:
    """Charges and returns of these instances so far."""
    calls = 0
    for store in stores:
        guarded: Any = store.store if isinstance(store, LeasedCounters) else store
        calls += guarded.store_calls + (store.sent_returns if isinstance(store, LeasedCounters) else 0)
    return calls


async def hot(server: BenchRedis, calls: int) -> tuple[float, float, float]:
    """CPU µs of a check of one subject: leased by 4 instances, in memory; and CPU of Redis per check."""
    limits = LimitSet("hot", Algorithm.SLIDING_WINDOW, [Limit.parse("10000000/minute")])
    counters = ((limits, "u"),)
    stores = _instances(server.url, 4, leases=True)
    memory = MemoryCounters()
    for _ in range(60):
        for store in stores:
            for _ in range(500):
                await store.charge([Charge(counters)])
        await asyncio.sleep(0.005)
    redis_before = redis_cpu_us(server)
    own: list[float] = []
    beside: list[float] = []
    decided = 0
    gc.disable()
    for _ in range(calls // 1_000):
        for store in stores:
            cpu = time.process_time()
            for _ in range(250):
                if store.charge_now(counters, 1) is None:
                    await store.charge([Charge(counters)])
            own.append((time.process_time() - cpu) / 250 * 1e6)
            decided += 250
            cpu = time.process_time()
            for _ in range(250):
                memory.charge_all(counters, 1)
            beside.append((time.process_time() - cpu) / 250 * 1e6)
        await asyncio.sleep(0)
    gc.enable()
    redis_us = (redis_cpu_us(server) - redis_before) / decided
    await asyncio.gather(*(store.close() for store in stores))
    return statistics.mean(own), statistics.mean(beside), redis_us


@contextlib.asynccontextmanager
async def _far_away(server: BenchRedis, each_way_s: float) -> AsyncIterator[str]:
    """A proxy in front of Redis that delays all bytes."""
    port = int(server.url.rpartition(":")[2].partition("/")[0])
    loop = asyncio.get_running_loop()
    writers: list[asyncio.StreamWriter] = []

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            loop.call_later(each_way_s, writer.write, data)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)
        writers.extend((writer, up_writer))
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(copy(reader, up_writer), copy(up_reader, writer))

    proxy = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{proxy.sockets[0].getsockname()[1]}/0"
    finally:
        proxy.close()
        for writer in writers:
            writer.close()


async def p99_ms(url: str, seconds: float, *, leases: bool) -> float:
    """p99 of checks of 50 busy subjects, ms, at a steady pace."""
    limits = LimitSet(f"far:{url}:{leases}", Algorithm.SLIDING_WINDOW, [Limit.parse("1000000/minute")])
    counters = [((limits, f"u{number}"),) for number in range(50)]
    [store] = _instances(url, 1, leases)
    taken: list[float] = []

    async def check(number: int, kept: bool) -> None:
        started = time.perf_counter()
        await store.charge([Charge(counters[number])])
        if kept:
            taken.append(time.perf_counter() - started)

    pending: set[asyncio.Task[None]] = set()
    started, number = time.perf_counter(), 0
    while (now := time.perf_counter()) - started < 2 * seconds:
        for _ in range(10):
            task = asyncio.ensure_future(check(number % 50, kept=now - started > seconds))
            pending.add(task)
            task.add_done_callback(pending.discard)
            number += 1
        await asyncio.sleep(0.005)
    await asyncio.gather(*pending)
    await store.close()
    return statistics.quantiles(taken, n=100)[98] * 1000


async def latencies(server: BenchRedis, seconds: float) -> tuple[float, float, float]:
    """p99, ms: loopback without leases, 5 ms away with leases, 5 ms away without."""
    near = await p99_ms(server.url, seconds, leases=False)
    async with _far_away(server, 0.0025) as url:
        return near, await p99_ms(url, seconds, leases=True), await p99_ms(url, seconds, leases=False)


def memory_of_key(server: BenchRedis, algorithm: Algorithm) -> int:
    """Bytes that a counter grows by while units of it are leased."""
    limits = LimitSet("memory", algorithm, [Limit.parse("600/minute")])
    sizes: list[int] = []
    run: Any = server.client.execute_command  # redis-py leaves it untyped
    for work, extra in (("charge", ()), ("lease", (msgspec.msgpack.encode((90, 2, 5_000_000)),))):
        source = script(work, frozenset((algorithm,))).source
        for _ in range(3):
            run("EVAL", source, 1, f"tg:{{=memory}}{work:8.8}", parameters(limits), 50, *extra)
        sizes.append(int(run("MEMORY", "USAGE", f"tg:{{=memory}}{work:8.8}")))
        run("DEL", f"tg:{{=memory}}{work:8.8}")
    return sizes[1] - sizes[0]


def _run(work: Awaitable[Any]) -> Any:
    async def main() -> Any:
        return await work

    return uvloop.run(main())


def main() -> None:
    smoke = asked_for_smoke(__doc__)
    rounds, seconds, calls = (1, 1.0, 8_000) if smoke else (5, 20.0, 2_000_000)
    need_wrk()
    with redis_server() as server:
        without = _run(zipf(server, seconds, leases=False, affinity=True))
        spread = _run(zipf(server, seconds, leases=True, affinity=False))
        same = _run(zipf(server, seconds, leases=True, affinity=True))
        own_us, memory_us, redis_us = _run(hot(server, calls))
        near, far, far_without = _run(latencies(server, seconds / 4))
        grown = {algorithm: memory_of_key(server, algorithm) for algorithm in (Algorithm.SLIDING_WINDOW, Algorithm.TOKEN_BUCKET)}
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two, contextlib.ExitStack() as stack:
            leased = stack.enter_context(ours(one, TIDEGATE_COUNTERS__URL=server.url, TIDEGATE_LEASES__ENABLED="true"))
            memory = stack.enter_context(ours(two))
            targets: dict[str, Any] = {"leased": (leased, "/v1/authorize", None), "memory": (memory, "/v1/authorize", None)}
            cpu_us, _ = interleaved(targets, rounds, 1 if smoke else 3)
    report(
        "leases",
        "Leases on Redis",
        [
            ("Zipf: store calls per check, without leases", without.calls / without.checks, None),
            ("Zipf: store calls per check, with leases", spread.calls / spread.checks, Goal(at_most=0.5)),
            ("Zipf: store calls per check, with leases and affinity", same.calls / same.checks, Goal(at_most=0.15)),
            ("Zipf: first checks of a subject at an instance, the least calls there can be", spread.first, None),
            ("Zipf: the same with affinity", same.first, None),
            ("Zipf: share of checks decided from leases, with affinity", same.leased, None),
            ("Zipf: checks a second, without leases", without.rate, None),
            ("Zipf: checks a second, with leases and affinity", same.rate, None),
            ("Zipf: CPU s of Redis per 10^6 checks, without leases", without.redis_us, None),
            ("Zipf: CPU s of Redis per 10^6 checks, with leases", spread.redis_us, None),
            ("Zipf: CPU s of Redis per 10^6 checks, with leases and affinity", same.redis_us, None),
            ("Hot subject: CPU of a check in the library, ratio to memory", own_us / memory_us, Goal(at_most=1.3)),
            ("Hot subject: CPU of Redis per check, µs", redis_us, Goal(at_most=0.1)),
            ("GET /v1/authorize, CPU to the same in memory", ratio(cpu_us, "leased", "memory"), Goal(at_most=1.15)),
            ("p99 with Redis 5 ms away and leases, ratio to Redis on loopback", far / near, Goal(at_most=2)),
            ("p99 with Redis 5 ms away without leases, ratio to Redis on loopback", far_without / near, None),
            ("Memory of a window's key while leased, bytes more", grown[Algorithm.SLIDING_WINDOW], Goal(at_most=0)),
            ("Memory of a bucket's key while leased, bytes more", grown[Algorithm.TOKEN_BUCKET], Goal(at_most=24)),
        ],
        smoke=smoke,
    )


if __name__ == "__main__":
    main()
