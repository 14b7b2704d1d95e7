"""What holds cost beside checks, what an open hold takes in memory, and how much of a token budget they leave usable.

    python -m bench.holds [--smoke | --short]

`--short` makes 3 rounds of 2,000 calls and opens 20,000 holds, in place of 5, 10,000 and 100,000.

*Cost*: one hold with its settlement (`Limiter.hold`) beside one `Limiter.check`, in memory and on Redis, 64 in flight over 10,000
subjects. CPU of the client is its process's own. CPU of Redis is that of its process, reading and answering included: times in
INFO commandstats are of the clock, and so of whatever else the machine does. Rounds are interleaved; medians of the ratios round
by round are printed. *HTTP*: `POST /v1/holds` and `POST /v1/holds/{id}/settle` beside `POST /v1/check` of the same key and path,
two counters each, 16 connections; CPU of the server. *Memory*: the growth of `used_memory` over the number of open holds, 64
opened at once, so that the buffers of the client stay small; in process, what tracemalloc counts. *Replay*: requests of language
models, drawn with a fixed seed: tokens log-normal around 600, answers of 50 tokens a second, estimates 4 times too high, 1.5
times as much demand as budget. The same log is replayed with holds, and with checks that charge the estimate, on counters in
memory with a clock of the bench's own. A bucket of one minute cannot meet the goal with this log,
whatever the algorithm: `bench.hold_bounds` computes how much it could leave at most. So the same log is also replayed with a
burst of five minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import random
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

import uvloop

from bench.hold_bounds import Held, most_usable, usable_by_rerun
from bench.http import cpu_of_threads_s, ours
from bench.measure import Goal, report
from bench.redis_calls import IN_FLIGHT, limiter
from bench.redis_peers import SUBJECTS
from bench.redis_server import BenchRedis, info, redis_cpu_us, redis_server
from tidegate import Limiter
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.holds import HoldHandle
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.redis.store import RedisCounters
from tidegate.policy.limits import Algorithm, Limit, LimitSet

TOO_HIGH: Final = 4
TTL_US: Final = 3_600_000_000
# A leaky bucket is a token bucket that admits one unit at once.
ALGORITHMS: Final = (Algorithm.FIXED_WINDOW, Algorithm.SLIDING_WINDOW, Algorithm.SLIDING_LOG, Algorithm.TOKEN_BUCKET)
STREAM_START_US, STREAM_TOKEN_US = 500_000, 20_000
CONNECTIONS: Final = 16
CHECK: Final[dict[str, object]] = {"api_key": "demo-free-key-0001", "method": "GET", "path": "/api/v1/items", "ip": "203.0.113.7"}


class Cost(NamedTuple):
    """CPU of a check, and of a hold with its settlement, µs."""

    check_us: float
    hold_us: float


class LoggedRequest(NamedTuple):
    """A request of the replayed log.

    Args:
        at_us: when it arrives.
        ends_us: when its answer ends.
    """

    at_us: int
    tokens: int
    ends_us: int


async def _cpu_us(work: Callable[[str], Awaitable[object]], calls: int) -> float:
    numbers = iter(range(calls))

    async def take_turns() -> None:
        for number in numbers:
            await work(SUBJECTS[number % len(SUBJECTS)])

    started = time.process_time()
    await asyncio.gather(*(take_turns() for _ in range(IN_FLIGHT)))
    return (time.process_time() - started) / calls * 1e6


def _hold_and_settle(own: Limiter) -> Callable[[str], Awaitable[object]]:
    async def work(subject: str) -> None:
        async with own.hold(subject, cost=4) as hold:
            hold.settle(1)

    return work


def in_memory(algorithm: str, calls: int) -> Cost:
    """Counters in memory; a store of its own for each, so that ended holds do not burden the checks."""

    async def measure() -> Cost:
        checks, holds = (limiter("memory://", algorithm) for _ in range(2))
        check_us = await _cpu_us(checks.check, calls)
        return Cost(check_us, await _cpu_us(_hold_and_settle(holds), calls))

    return uvloop.run(measure())


def on_redis(server: BenchRedis, algorithm: str, calls: int) -> tuple[Cost, Cost]:
    """Of the client and of Redis."""

    async def measure() -> tuple[Cost, Cost]:
        own = limiter(server.url, algorithm)
        holds = _hold_and_settle(own)
        client: list[float] = []
        redis: list[float] = []
        for work in (own.check, holds):
            server.client.flushdb()
            await _cpu_us(work, 20 * IN_FLIGHT)
            before_us = redis_cpu_us(server)
            client.append(await _cpu_us(work, calls))
            redis.append((redis_cpu_us(server) - before_us) / calls)
        if not isinstance(own.counters, GuardedCounters) or own.counters.degraded:
            raise RuntimeError("holds or checks were decided without Redis: the figure would be of another path")
        await own.close()
        return Cost(*client), Cost(*redis)

    return uvloop.run(measure())


class HttpConnection:
    """A connection to a server, on which one request follows the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def post(self, path: str, body: dict[str, object]) -> dict[str, object]:
        """Send a request; gives the body of its answer, which must be 200."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        self._writer.write(head.encode() + content)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        length = next(int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length"))
        answer: dict[str, object] = json.loads(await self._reader.readexactly(length))
        if b" 200" not in lines[0]:
            raise RuntimeError(f"{path} was answered with {lines[0]!r}: {answer}")
        return answer

    async def check(self) -> None:
        """One check."""
        await self.post("/v1/check", CHECK)

    async def hold_and_settle(self) -> None:
        """One hold, and its settlement."""
        opened = await self.post("/v1/holds", {**CHECK, "cost": 4})
        await self.post(f"/v1/holds/{opened['hold']}/settle", {"cost": 1})

    def close(self) -> None:
        """Close it."""
        self._writer.close()


def at_http(pid: int, port: int, calls: int) -> Cost:
    """CPU of a server's process."""

    async def measure() -> Cost:
        connections = [HttpConnection(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(CONNECTIONS)]

        async def cpu_us(work: Callable[[HttpConnection], Awaitable[None]]) -> float:
            numbers = iter(range(calls))

            async def take_turns(connection: HttpConnection) -> None:
                for _ in numbers:
                    await work(connection)

            started_s = cpu_of_threads_s(pid)
            await asyncio.gather(*map(take_turns, connections))
            return (cpu_of_threads_s(pid) - started_s) / calls * 1e6

        for work in (HttpConnection.check, HttpConnection.hold_and_settle):
            # The first requests of a connection are slower.
            await asyncio.gather(*map(work, connections))
        cost = Cost(await cpu_us(HttpConnection.check), await cpu_us(HttpConnection.hold_and_settle))
        for each in connections:
            each.close()
        return cost

    return uvloop.run(measure())


def redis_bytes(server: BenchRedis, subjects: int, each: int, algorithm: Algorithm = Algorithm.SLIDING_WINDOW) -> float:
    """Growth of `used_memory` per open hold: counters of `subjects` that exist already, with `each` holds each."""
    limits = LimitSet("bench:holds", algorithm, [Limit.parse("1000000/day")])

    async def fill() -> float:
        store = RedisCounters(server.url, timeout_s=10)
        await store.start()
        for number in range(subjects):
            _, first = await store.open_hold(((limits, f"user-{number:07}"),), 1, TTL_US)
            if first is None:
                raise RuntimeError("a hold was denied")
        before = int(info(server, "memory")["used_memory"])
        for number in range(subjects):
            for done in range(0, each, IN_FLIGHT):
                count = min(IN_FLIGHT, each - done)
                opened = (store.open_hold(((limits, f"user-{number:07}"),), 4, TTL_US) for _ in range(count))
                if any(hold is None for _, hold in await asyncio.gather(*opened)):
                    raise RuntimeError("a hold was denied")
        grown = int(info(server, "memory")["used_memory"]) - before
        await store.close()
        return grown / (subjects * each)

    server.client.flushall()
    return uvloop.run(fill())


def process_bytes(count: int) -> float:
    """What tracemalloc counts per open hold of a counter in memory."""
    limits = LimitSet("bench:holds", Algorithm.SLIDING_WINDOW, [Limit.parse("1000000/day")])
    store = MemoryCounters()
    store.charge_one(limits, "user", 1)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(count):
            store.open_hold_now(((limits, "user"),), 4, TTL_US)
        return (tracemalloc.get_traced_memory()[0] - before) / count
    finally:
        tracemalloc.stop()


def requests_for(budget: int, period_us: int) -> list[LoggedRequest]:
    """A log of requests that want 1.5 times a budget, spread evenly over its period."""
    drawn = random.Random(22)
    sizes: list[int] = []
    wanted = 0
    while wanted < budget * 1.5:
        sizes.append(min(max(int(drawn.lognormvariate(6.4, 1.0)), 16), 16_000))
        wanted += sizes[-1]
    # The first moments of a day, so that a window of an hour or a day is the whole log.
    start = 1_767_225_600_000_000
    moments = sorted(start + drawn.randrange(period_us) for _ in sizes)
    return [
        LoggedRequest(at, tokens, at + STREAM_START_US + tokens * STREAM_TOKEN_US)
        for at, tokens in zip(moments, sizes, strict=True)
    ]


def usable(limit: str, algorithm: Algorithm, budget: int, period_us: int, *, held: bool) -> float:
    """The share of a budget that requests used, replayed with holds or with checks that charge the estimate."""
    limits = LimitSet("replay", algorithm, [Limit.parse(limit)])
    log = requests_for(budget, period_us)
    now = log[0].at_us
    store = MemoryCounters(clock=lambda: now)
    counters = ((limits, "user-42"),)
    ends: list[tuple[int, str, HoldHandle, int]] = []
    used = 0

    def settle_until(moment: int) -> None:
        nonlocal now, used
        while ends and ends[0][0] <= moment:
            now, _, handle, tokens = heapq.heappop(ends)
            store.settle_hold_now(handle, tokens)

    for request in log:
        settle_until(request.at_us)
        now = request.at_us
        estimate = request.tokens * TOO_HIGH
        if held:
            decision, handle = store.open_hold_now(counters, estimate, TTL_US)
            if handle is not None:
                heapq.heappush(ends, (request.ends_us, handle.id, handle, request.tokens))
        else:
            decision = store.charge_all(counters, estimate)
        if decision.allowed:
            used += request.tokens
    return used / budget


def bounds(minutes: int) -> list[tuple[str, float, Goal | None]]:
    """What any algorithm could leave of the bucket of 600,000 tokens a minute, and what this one leaves of it."""
    budget, period_us = 600_000 * minutes, minutes * 60_000_000
    log = [Held(each.at_us, each.tokens, each.tokens * TOO_HIGH, each.ends_us) for each in requests_for(budget, period_us)]
    name = f"% of 600,000 a minute for {minutes} minutes, token_bucket"
    own = usable("600000/minute", Algorithm.TOKEN_BUCKET, budget, period_us, held=True)
    return [
        (f"{name}, usable", 100 * own, None),
        (f"{name}, if histories were computed again", 100 * usable_by_rerun(log, 600_000, 0.01) / budget, None),
        (f"{name}, at most by any algorithm", 100 * most_usable(log, 600_000, 0.01, period_us) / budget, None),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="only find out whether it runs")
    parser.add_argument("--short", action="store_true", help="fewer rounds and calls")
    asked = parser.parse_args()
    smoke = asked.smoke
    rounds, calls, open_holds = (1, 500, 10_000) if smoke else (3, 2_000, 20_000) if asked.short else (5, 10_000, 100_000)
    day_us, hour_us = 86_400_000_000, 3_600_000_000
    figures: list[tuple[str, float, Goal | None]] = []
    with redis_server() as server:
        for algorithm in ALGORITHMS:
            memory = [in_memory(algorithm, calls) for _ in range(rounds)]
            redis = [on_redis(server, algorithm, calls) for _ in range(rounds)]
            sides = (
                ("in memory, client", memory),
                ("on Redis, client", [client for client, _ in redis]),
                ("on Redis, Redis", [server_side for _, server_side in redis]),
            )
            for side, costs in sides:
                name = f"{algorithm}, {side}"
                figures.append((f"{name}: hold + settle, µs CPU", statistics.median(each.hold_us for each in costs), None))
                ratio = statistics.median(each.hold_us / each.check_us for each in costs)
                figures.append((f"{name}: ratio to a check", ratio, Goal(at_most=2.5)))
        with (
            tempfile.TemporaryDirectory() as directory,
            tempfile.TemporaryDirectory() as other,
            ours(directory) as (pid, port),
            ours(other, TIDEGATE_COUNTERS__URL=server.url) as (redis_pid, redis_port),
        ):
            at_memory = [at_http(pid, port, calls // 2) for _ in range(rounds)]
            at_redis = [at_http(redis_pid, redis_port, calls // 2) for _ in range(rounds)]
        for side, costs in (("in memory", at_memory), ("on Redis", at_redis)):
            figures.append(
                (f"HTTP, counters {side}: hold + settle, µs CPU", statistics.median(each.hold_us for each in costs), None)
            )
            ratio = statistics.median(each.hold_us / each.check_us for each in costs)
            figures.append((f"HTTP, counters {side}: ratio to a check", ratio, Goal(at_most=2.5)))
        most = Goal(at_most=120)
        for each in (10, 100, 1_000, 1_100, 10_000):
            subjects = max(open_holds // each, 1)
            figures.append((f"bytes of an open hold in Redis, {each} a counter", redis_bytes(server, subjects, each), most))
        bucket = redis_bytes(server, open_holds // 1_000, 1_000, Algorithm.TOKEN_BUCKET)
        figures.append(("bytes of an open hold in Redis, 1000 a counter, token bucket", bucket, most))
        server.client.config_set("zset-max-listpack-entries", 1_024)
        compact = redis_bytes(server, open_holds // 1_000, 1_000)
        figures.append(("the same with zset-max-listpack-entries 1024", compact, most))
    for each in (100, 1_000, 1_100, 10_000):
        figures.append((f"bytes of an open hold in memory, {each} of a counter", process_bytes(each), most))
    minutes = 5 if smoke else 24 * 60
    replays = (
        ("10,000,000 a day, fixed_window", "10000000/day", Algorithm.FIXED_WINDOW, 10_000_000, day_us),
        ("10,000,000 an hour, fixed_window", "10000000/hour", Algorithm.FIXED_WINDOW, 10_000_000, hour_us),
        ("600,000 a minute, token_bucket", "600000/minute", Algorithm.TOKEN_BUCKET, 600_000 * minutes, minutes * 60_000_000),
        (
            "600,000 a minute burst 3,000,000, token_bucket",
            "600000/minute burst 3000000",
            Algorithm.TOKEN_BUCKET,
            600_000 * minutes,
            minutes * 60_000_000,
        ),
    )
    for name, limit, algorithm, budget, period_us in replays:
        for held in (True, False):
            share = usable(limit, algorithm, budget, period_us, held=held)
            goal = Goal(at_least=99.9) if held else None
            figures.append((f"% of {name} usable, {'holds' if held else 'charging the estimate'}", 100 * share, goal))
    figures += bounds(5 if smoke else 60)
    report("holds", "Holds", figures, smoke=smoke)


if __name__ == "__main__":
    main()
