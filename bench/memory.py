"""Resident bytes per live subject, and the longest a single check takes while a million subjects come, expire and go.

    python -m bench.memory [--smoke]

A process of its own for the counters; the subjects' names are made on the way and kept by nobody else.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from pathlib import Path

from bench.measure import Goal, report
from tidegate.counters.memory import MemoryCounters
from tidegate.policy.limits import Algorithm, Limit, LimitSet


def resident_bytes() -> int:
    """Resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


def measure(count: int, beginning: str = "user") -> None:
    """Print bytes per subject, and the slowest and the 99.99th percentile of single checks while growing and expiring, µs."""
    now = [1_700_000_000_000_000]
    store = MemoryCounters(max_subjects=count, clock=lambda: now[0])
    limits = LimitSet("bench", Algorithm.SLIDING_WINDOW, [Limit.parse("100/minute")])
    store.charge_one(limits, "warm-up", 1)
    gc.collect()
    gc.freeze()  # as the server does after its start
    before = resident_bytes()

    def run(prefix: str) -> list[int]:
        slowest: list[int] = []
        for number in range(count - 1):
            now[0] += 20
            subject = f"{prefix}-{number:07}"
            started = time.perf_counter_ns()
            store.charge_one(limits, subject, 1)
            took = time.perf_counter_ns() - started
            if took > 20_000:
                slowest.append(took)
        return sorted(slowest, reverse=True)

    growing = run(beginning)
    each = (resident_bytes() - before) / count
    held = len(store)
    now[0] += 180_000_000  # all of them expire at once, and as many others come
    expiring = run("next")
    place = count // 10_000
    values = [each, held]
    for slowest in (growing, expiring):
        values += [slowest[0] / 1e3 if slowest else 20.0, slowest[place] / 1e3 if len(slowest) > place else 20.0]
    print(*values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the smallest size: that it works, not how much")
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--beginning", default="user", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.count is not None:
        measure(arguments.count, arguments.beginning)
        return
    count = 20_000 if arguments.smoke else 1_000_000
    command = [sys.executable, "-m", "bench.memory", "--count", str(count)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    each, held, grow_max, grow_tail, expire_max, expire_tail = map(float, out.split())
    report(
        "memory",
        f"{count:,} live subjects on one sliding-window limit",
        [
            ("resident bytes each", each, Goal(at_most=250)),
            ("subjects held", held, None),
            ("slowest single check while they come, µs", grow_max, None),
            ("99.99th percentile there, µs", grow_tail, None),
            ("slowest single check while all expire and others come, µs", expire_max, None),
            ("99.99th percentile there, µs", expire_tail, None),
        ],
        smoke=arguments.smoke,
    )


if __name__ == "__main__":
    main()
