"""Checks per CPU second in one process, beside `limits` and `throttled-py`, and by algorithm.

    python -m bench.inprocess [--smoke]

10,000 subjects take turns on 100,000/minute, so that every check is charged. Rounds are interleaved; CPU time is the
process's own; medians and the median of the ratios round by round are printed. What importing takes is the CPU time of an
interpreter that imports the package, less that of one that imports nothing.
"""

from __future__ import annotations

import asyncio
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import throttled
from limits import parse, storage, strategies

from bench.measure import Goal, asked_for_smoke, report
from tidegate import Limiter
from tidegate.policy.limits import Algorithm

SUBJECTS = [f"user-{number}" for number in range(10_000)]


async def per_check_us(check: Callable[[str], Awaitable[object]], count: int) -> float:
    """CPU µs of one awaited check."""
    started = time.process_time()
    for number in range(count):
        await check(SUBJECTS[number % 10_000])
    return (time.process_time() - started) / count * 1e6


def per_call_us(check: Callable[[str], object], count: int) -> float:
    """CPU µs of one plain call: the peers' own loops await nothing."""
    started = time.process_time()
    for number in range(count):
        check(SUBJECTS[number % 10_000])
    return (time.process_time() - started) / count * 1e6


def import_ms(package: str) -> float:
    """CPU ms of an interpreter that imports a package, or runs the line, and ends; what it compiled is kept for the next one."""
    line = package if " " in package else f"import {package}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", line], check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e3


async def main() -> None:
    smoke = asked_for_smoke(__doc__)
    rounds, count = (2, 12_000) if smoke else (9, 200_000)
    moving = strategies.SlidingWindowCounterRateLimiter(storage.MemoryStorage())
    item = parse("100000/minute")
    peer = throttled.Throttled(
        using=throttled.RateLimiterType.SLIDING_WINDOW.value,
        quota=throttled.rate_limiter.per_min(100_000),
        store=throttled.store.MemoryStore(options={"MAX_SIZE": 20_000}),
    )
    limiter = Limiter("100000/minute")
    ours, limits_us, throttled_us = [], [], []
    for warm_up in (True, *[False] * rounds):
        one = await per_check_us(limiter.check, count)
        two = per_call_us(lambda subject: moving.hit(item, subject), count)
        three = per_call_us(peer.limit, count)
        if not warm_up:
            ours.append(one)
            limits_us.append(two)
            throttled_us.append(three)
    figures: list[tuple[str, float, Goal | None]] = [
        ("Tidegate, await Limiter.check, µs CPU", statistics.median(ours), Goal(at_most=10)),
        ("limits, SlidingWindowCounterRateLimiter.hit, µs CPU", statistics.median(limits_us), None),
        ("throttled-py, sliding window, limit(), µs CPU", statistics.median(throttled_us), None),
        ("checks per CPU second, ratio to limits", _ratio(limits_us, ours), Goal(at_least=3)),
        ("checks per CPU second, ratio to throttled-py", _ratio(throttled_us, ours), Goal(at_least=3)),
    ]
    for algorithm in Algorithm:
        each = Limiter("100000/minute", algorithm=algorithm)
        await per_check_us(each.check, count)
        figures.append((f"{algorithm}, µs CPU", await _median_us(each, count), None))
    two_limits = Limiter(["100000/minute", "900000/day"])
    figures.append(("two limits, µs CPU", await _median_us(two_limits, count), None))
    packages = {
        "Tidegate": "tidegate",
        "Tidegate with Limiter and limit": "from tidegate import Limiter, limit",
        "limits": "limits",
        "throttled-py": "throttled",
    }
    imports = [{name: import_ms(package) - import_ms("sys") for name, package in packages.items()} for _ in range(rounds)]
    for name in packages:
        figures.append((f"import of {name}, ms CPU", statistics.median(each[name] for each in imports), None))
    for name in list(packages)[:2]:
        ratio = statistics.median(each[name] / each["limits"] for each in imports)
        figures.append((f"import of {name}, CPU to that of limits", ratio, Goal(at_most=1.3)))
    report("inprocess", "In one process, counters in memory, sliding window, 10,000 subjects", figures, smoke=smoke)


async def _median_us(limiter: Limiter, count: int) -> float:
    return statistics.median([await per_check_us(limiter.check, count) for _ in range(3)])


def _ratio(theirs: list[float], ours: list[float]) -> float:
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


if __name__ == "__main__":
    asyncio.run(main())
