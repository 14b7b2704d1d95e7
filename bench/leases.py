"""What leases save: calls to the store, CPU of Redis and of the library, and latency with a Redis that is far away.

    python -m bench.leases [--smoke] [--zipf]

`--zipf` measures that workload alone, and prints each figure as soon as it is known.

Each ratio is of one run, with and without leases or memory beside them. *Zipf*: 50 instances in one process, each with a
connection of its own, over one Redis; 100,000 subjects with exponent 1.1, limits of 1,000/minute; as many checks as the machine
makes in two minutes, the rate is printed beside. The first minute is the cold start, in which every subject is new to every
instance; the figures are of the second one, which has each moment of a window once, and the store calls also of both together.
About half of the checks are of subjects that ask for more than their limit. With affinity each subject is sent to one instance.
*Hot*: one subject, 10,000,000/minute, over 4 instances; memory beside it. *Far*: 50 subjects behind a proxy that delays each
way by half of 5 ms. A store call is a charge, a request for a lease, or a call that gives leases back: one for up to 50 of
them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import statistics
import sys
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
CHOSEN_AT_ONCE = 100_000


class Workload(NamedTuple):
    """What a run did in some time.

    Args:
        checks: how many.
        calls: to the store.
        redis_us: CPU of Redis, µs.
        seconds: how long.
        leased: checks decided from leases.
        first: checks that are the first of a subject at an instance: each needs a call.
    """

    checks: int
    calls: int
    redis_us: float
    seconds: float
    leased: int
    first: int

    def since(self, before: Workload) -> Workload:
        """What it did after a moment."""
        differences: list[Any] = [mine - earlier for mine, earlier in zip(self, before, strict=True)]
        return Workload(*differences)


def _instances(url: str, count: int, leases: bool) -> list[Any]:
    guarded = [GuardedCounters(RedisCounters(url, timeout_s=2.0), GuardOptions(min_instances=count)) for _ in range(count)]
    return [LeasedCounters(each) for each in guarded] if leases else guarded


async def zipf(
    server: BenchRedis, seconds: float, algorithm: Algorithm, *, leases: bool, affinity: bool
) -> tuple[Workload, Workload]:
    """Checks of subjects by a Zipf distribution: all of them, and those of the second half of the time."""
    chosen = random.Random(7)
    weights = list(accumulate(1 / rank**EXPONENT for rank in range(1, SUBJECTS + 1)))
    limits = LimitSet(f"zipf:{leases}:{affinity}", algorithm, [Limit.parse("1000/minute")])
    counters = [((limits, f"u{number}"),) for number in range(SUBJECTS)]
    stores = _instances(server.url, INSTANCES, leases)
    numbers: list[int] = []
    checks = 0
    known: set[tuple[int, int]] = set()
    await asyncio.gather(*(store.charge([Charge(((limits, f"warm{place}"),), 1)]) for place, store in enumerate(stores)))
    before, cpu, started = _calls(stores), redis_cpu_us(server), time.perf_counter()

    def so_far() -> Workload:
        leased = sum(store.table.decisions for store in stores if leases)
        used_us, passed_s = redis_cpu_us(server) - cpu, time.perf_counter() - started
        return Workload(checks, _calls(stores) - before, used_us, passed_s, leased, len(known))

    half: list[Workload] = []

    async def take_turns() -> None:
        nonlocal checks, numbers
        while (passed := time.perf_counter() - started) < seconds:
            if passed * 2 >= seconds and not half:
                half.append(so_far())
            if not numbers:
                numbers = chosen.choices(range(SUBJECTS), cum_weights=weights, k=CHOSEN_AT_ONCE)
            number = numbers.pop()
            place = number % INSTANCES if affinity else checks % INSTANCES
            store = stores[place]
            known.add((number, place))
            checks += 1
            # As the gate does: what leases decide waits for nothing.
            if not leases or store.charge_now(counters[number], 1) is None:
                await store.charge([Charge(counters[number])])
            if not checks % 16:
                await asyncio.sleep(0)

    await asyncio.gather(*(take_turns() for _ in range(IN_FLIGHT)))
    whole = so_far()
    await asyncio.gather(*(store.close() for store in stores))
    return whole, whole.since(half[0])


def _calls(stores: Sequence[Any]) -> int:
    """Charges, requests for leases, and calls that give leases back, of these instances so far."""
    guarded: list[Any] = [store.store if isinstance(store, LeasedCounters) else store for store in stores]
    return sum(each.store_calls + each.store.return_calls for each in guarded)


def _zipf_lines(server: BenchRedis, seconds: float, *, prints: bool) -> list[tuple[str, float, Goal | None]]:
    """The figures of the Zipf workload, for two algorithms."""
    lines: list[tuple[str, float, Goal | None]] = []
    for algorithm in (Algorithm.SLIDING_WINDOW, Algorithm.FIXED_WINDOW):
        for what, leases, affinity, most in (
            ("with leases and affinity", True, True, 0.15),
            ("with leases", True, False, 0.5),
            ("without leases", False, True, None),
        ):
            whole, warm = _run(zipf(server, seconds, algorithm, leases=leases, affinity=affinity))
            name = f"Zipf, {algorithm}, {what}"
            found: list[tuple[str, float, Goal | None]] = [
                (f"{name}: store calls per check", warm.calls / warm.checks, None if most is None else Goal(at_most=most)),
                (f"{name}: the same with the cold start", whole.calls / whole.checks, None),
                (f"{name}: first checks of a subject at an instance", warm.first / warm.checks, None),
                (f"{name}: share decided from leases", warm.leased / warm.checks, None),
                (f"{name}: CPU s of Redis per 10^6 checks", warm.redis_us / warm.checks, None),
                (f"{name}: checks a second", warm.checks / warm.seconds, None),
            ]
            lines += found
            if prints:
                print("\n".join(f"{label} {value:.3f}" for label, value, _ in found), flush=True)
    return lines


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
    zipf_alone = "--zipf" in sys.argv
    if zipf_alone:
        sys.argv.remove("--zipf")
    smoke = asked_for_smoke(__doc__)
    rounds, seconds, calls = (1, 1.0, 8_000) if smoke else (5, 20.0, 2_000_000)
    zipf_s = 1.0 if smoke else 120.0
    need_wrk()
    with redis_server() as server:
        zipf_lines = _zipf_lines(server, zipf_s, prints=zipf_alone)
        if zipf_alone:
            report("leases_zipf", "Leases on Redis: Zipf", zipf_lines, smoke=smoke)
            return
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
            *zipf_lines,
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
