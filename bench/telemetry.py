"""What telemetry costs a check, beside prometheus_client's own counters; a scrape with 1,000 rules; a log line; a span.

    python -m bench.telemetry [--smoke]

CPU time of this process; rounds are interleaved; medians, and the median of the ratios round by round, are printed. The peer does
what ours does at the least: one labelled counter and one histogram, with children looked up once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, Counter, Histogram

from bench.measure import Goal, asked_for_smoke, report
from tidegate.decision import Check, Decision
from tidegate.latency import BUCKETS_S
from tidegate.observation import Observation
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.telemetry.access import AccessLog
from tidegate.telemetry.logs import configure_logging
from tidegate.telemetry.metrics import Metrics
from tidegate.telemetry.requests import CURRENT, Request
from tidegate.telemetry.tracing import Tracing
from tidegate.violations.recorder import Violations

RULES = 1000


def checks(rules: int, count: int, *, allowed: bool = True) -> list[Observation]:
    """Observations of checks of so many rules in turn."""
    limits = [
        LimitSet(f"t:/{number}", Algorithm.SLIDING_WINDOW, [Limit.parse("100/minute")], rule=f"/api/v1/rule{number}", tier="free")
        for number in range(rules)
    ]
    made = []
    for number in range(count):
        each = limits[number % rules]
        decision = Decision(allowed, each.limits[0], 50, limits=each, at_us=1_700_000_000_000_000)
        made.append(Observation(decision, None, 400_000, (), f"k:{number % 100:024x}", None if allowed else each))
    return made


def per_call_ns(observe: Callable[[Observation], None], seen: Sequence[Observation]) -> float:
    """CPU ns of one call."""
    started = time.process_time_ns()
    for each in seen:
        observe(each)
    return (time.process_time_ns() - started) / len(seen)


def ours() -> Callable[[Observation], None]:
    """As a server has it."""
    count, note = Metrics("bench").observe, Violations().observe

    def observe(seen: Observation) -> None:
        count(seen)
        note(seen)

    return observe


def peer() -> Callable[[Observation], None]:
    """prometheus_client's own."""
    registry = CollectorRegistry()
    requests = Counter("requests", "checks", ["status"], registry=registry)
    latency = Histogram("latency_seconds", "time", buckets=BUCKETS_S, registry=registry)
    allowed, blocked = requests.labels("allowed"), requests.labels("blocked")

    def observe(seen: Observation) -> None:
        (allowed if seen.decision is not None and seen.decision.allowed else blocked).inc()
        latency.observe(seen.latency_ns / 1e9)

    return observe


def traced(sample: float) -> Callable[[Observation], None]:
    """As a server has it that traces a share of the checks; spans are made and thrown away."""
    own, tracing = ours(), Tracing("", sample, InMemorySpanExporter())

    def observe(seen: Observation) -> None:
        own(seen)
        tracing.observe(seen)

    return observe


def line_us(count: int) -> float:
    """CPU µs of one line of the access log, the writing of it included."""
    with Path(os.devnull).open("w") as nowhere:
        writer = configure_logging("info", "json", stream=nowhere)
        access, request = (
            AccessLog(1.0),
            Request({"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}, True),
        )
        request.check, request.observation = Check.of("/api/v1/items"), checks(1, 1)[0]
        token = CURRENT.set(request)
        started = time.process_time()
        for _ in range(count):
            access.write(request, "/v1/authorize", 204, 400_000)
        writer.close()
        taken = time.process_time() - started
        logging.getLogger().handlers.clear()
        CURRENT.reset(token)
    return taken / count * 1e6


class Scrape(NamedTuple):
    """What one scrape took."""

    cpu_s: float
    held_s: float
    size: int


async def scrape(metrics: Metrics) -> Scrape:
    """Make the exposition while something else wants its turn on the loop all the time, as checks do."""
    held_s = 0.0
    others_s = 0.0

    async def wait_for_turns() -> None:
        nonlocal held_s, others_s
        left = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            came = time.perf_counter()
            held_s = max(held_s, came - left)
            left = time.perf_counter()
            others_s += left - came

    waiting = asyncio.create_task(wait_for_turns())
    await asyncio.sleep(0)
    started = time.process_time()
    exposition = await metrics.exposition()
    taken = time.process_time() - started - others_s
    waiting.cancel()
    return Scrape(taken, held_s, len(exposition))


def main() -> None:
    smoke = asked_for_smoke(__doc__)
    rounds, count = (2, 20_000) if smoke else (9, 200_000)
    figures: list[tuple[str, float, Goal | None]] = []
    for label, seen in (
        ("allowed, one rule", checks(1, count)),
        (f"allowed, {RULES:,} rules", checks(RULES, count)),
        ("blocked, one rule", checks(1, count, allowed=False)),
    ):
        own, their = [], []
        for warm_up in (True, *[False] * rounds):
            one, two = per_call_ns(ours(), seen), per_call_ns(peer(), seen)
            if not warm_up:
                own.append(one)
                their.append(two)
        ratio = statistics.median(each / other for each, other in zip(their, own, strict=True))
        figures.append((f"{label}, ns CPU a check", statistics.median(own), Goal(at_most=1500)))
        figures.append((f"{label}, cheaper than prometheus_client, ratio", ratio, None))
    metrics = Metrics("bench")
    for each in checks(RULES, RULES):
        metrics.observe(each)
    scrapes = [asyncio.run(scrape(metrics)) for _ in range(3 if smoke else 15)]
    figures.append((f"a scrape with {RULES:,} rules, ms CPU", statistics.median(each.cpu_s for each in scrapes) * 1e3, None))
    held_ms = statistics.median(each.held_s for each in scrapes) * 1e3
    figures.append(("the longest that it holds up checks, ms", held_ms, Goal(at_most=10)))
    figures.append((f"/metrics with {RULES:,} rules, kB", scrapes[-1].size / 1e3, None))
    figures.append(("a line of the access log, µs CPU", line_us(1000 if smoke else 20_000), None))
    seen = checks(1, count // 10)
    plain = statistics.median(per_call_ns(ours(), seen) for _ in range(3))
    for sample in (0.01, 1.0):
        taken_ns = statistics.median(per_call_ns(traced(sample), seen) for _ in range(3))
        figures.append((f"tracing {sample:.0%} of the checks, added to each, µs CPU", (taken_ns - plain) / 1e3, None))
    report("telemetry", "What telemetry costs", figures, smoke=smoke)


if __name__ == "__main__":
    main()
