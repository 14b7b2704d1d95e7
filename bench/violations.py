"""What counting violations costs a check: allowed, blocked as before, and blocked in a flood of subjects.

    python -m bench.violations [--smoke]

Beside it a plain `collections.Counter` over the same keys, which a flood grows without bound. Rounds are interleaved; CPU time is
the process's own; medians and the median of the ratios round by round are printed. Memory is what `tracemalloc` sees at the end.
Then what writing a full summary to SQLite costs, and how long a task that only waits for its turn waited for it.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence

from bench.measure import Goal, asked_for_smoke, report
from tidegate.catalog.sql.database import Database
from tidegate.decision import Decision
from tidegate.observation import Observation
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.violations.recorder import MAX_ENTRIES, Violations, ViolationWriter

LIMITS = LimitSet("bench", Algorithm.SLIDING_WINDOW, [Limit.parse("100/minute")], rule="/api/v1/*", tier="free")
AT_US = 1_700_000_000_000_000
KNOWN = 1_000


def seen(number: int, *, allowed: bool = False) -> Observation:
    """The observation of one check of a subject."""
    return Observation(
        Decision(allowed, at_us=AT_US, limits=LIMITS), None, 1_000, (), f"k:{number:024x}", None if allowed else LIMITS
    )


def per_call_ns(observe: Callable[[Observation], None], checks: Sequence[Observation]) -> float:
    """CPU ns of one call."""
    started = time.process_time_ns()
    for check in checks:
        observe(check)
    return (time.process_time_ns() - started) / len(checks)


def counting() -> Callable[[Observation], None]:
    """What is least: a Counter over the same keys, without a bound, without sums."""
    counter: Counter[tuple[int, str, str, str]] = Counter()

    def observe(check: Observation) -> None:
        decision = check.decision
        if decision is None or decision.allowed:
            return
        at_us, limits = decision.at_us, decision.limits
        assert limits is not None
        counter[(at_us - at_us % 60_000_000, limits.tier or "", limits.rule or "", check.subject or "")] += 1

    return observe


def grown_mb(make: Callable[[], Callable[[Observation], None]], count: int) -> float:
    """MB that a flood of so many subjects leaves behind."""
    tracemalloc.start()
    observe = make()
    for number in range(count):
        observe(seen(number))
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return grown / 1e6


async def writing(rounds: int) -> tuple[float, float]:
    """CPU µs of a row, and ms that a check waited at most, each the median of the rounds."""
    cpu_us, waited_ms = [], []
    with tempfile.TemporaryDirectory() as directory:
        database = await Database.open(f"sqlite:///{directory}/bench.db")
        violations = Violations()
        writer = ViolationWriter(violations, database)
        longest = 0.0

        async def turns() -> None:
            nonlocal longest
            while True:
                since = time.perf_counter()
                await asyncio.sleep(0)
                longest = max(longest, time.perf_counter() - since)

        for number in range(rounds * MAX_ENTRIES):
            violations.observe(seen(number))
            if (number + 1) % MAX_ENTRIES == 0 and number // MAX_ENTRIES % 2:
                started = time.process_time()
                await writer.flush(60)
                cpu_us.append((time.process_time() - started) / MAX_ENTRIES * 1e6)
            elif (number + 1) % MAX_ENTRIES == 0:
                longest, waiting = 0.0, asyncio.create_task(turns())
                await writer.flush(60)
                waiting.cancel()
                waited_ms.append(longest * 1e3)
        assert writer.written == rounds * MAX_ENTRIES
        await database.close()
    return statistics.median(cpu_us), statistics.median(waited_ms)


def main() -> None:
    smoke = asked_for_smoke(__doc__)
    rounds, count, flood = (2, 30_000, 30_000) if smoke else (9, 200_000, 1_000_000)
    kinds = {
        "allowed": [seen(number % KNOWN, allowed=True) for number in range(count)],
        f"blocked, {KNOWN:,} subjects in turn": [seen(number % KNOWN) for number in range(count)],
        "blocked, one subject": [seen(0)] * count,
        f"blocked, {count:,} subjects once each": [seen(number) for number in range(count)],
    }
    figures: list[tuple[str, float, Goal | None]] = []
    for label, checks in kinds.items():
        ours, plain = [], []
        for warm_up in (True, *[False] * rounds):
            one = per_call_ns(Violations().observe, checks)
            two = per_call_ns(counting(), checks)
            if not warm_up:
                ours.append(one)
                plain.append(two)
        goal = Goal(at_most=100 if label == "allowed" else 2_000)
        figures.append((f"{label}, ns CPU", statistics.median(ours), goal))
        figures.append((f"{label}, ratio to a Counter", _ratio(ours, plain), None))
    figures.append(
        (f"memory after {flood:,} subjects, {MAX_ENTRIES:,} held, MB", grown_mb(lambda: Violations().observe, flood), None)
    )
    figures.append((f"memory after {flood:,} subjects, Counter, MB", grown_mb(counting, flood), None))
    cpu_us, waited_ms = asyncio.run(writing(2 * rounds))
    figures.append((f"writing {MAX_ENTRIES:,} subjects to SQLite, µs CPU each", cpu_us, None))
    figures.append(("meanwhile, longest wait of a check for its turn, ms", waited_ms, Goal(at_most=10)))
    report("violations", "Counting blocked checks", figures, smoke=smoke)


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
