"""Mixed load for minutes while workers, connections and replicas are killed at random: nothing leaks, nothing drifts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from tests.servers.process_tree import has_ended, tree_of

from drills.check_load import policy_of
from drills.figures import longest_gap_s, percentile_ms
from drills.findings import Findings, none_of
from drills.flood import rss_mib
from drills.outcome import Goal
from drills.redis_outages import Size
from drills.running import Running, in_thread
from drills.stack import Sizes, Stack

RATE: Final = 200
SUBJECTS: Final = 60
WORKERS: Final = 2
LEAK_MIB_A_MINUTE: Final = 1.0
"""Less than this is the allocator's, which settles over some minutes."""
PAUSE_S: Final = (3.0, 6.0)
SEED: Final = 20_26


def slope(values: Sequence[float], every_s: float = 1.0) -> float:
    """How fast something grows: the line of least squares.

    Args:
        values: two or more.
        every_s: between two of them.

    Returns:
        Growth a minute.
    """
    middle = (len(values) - 1) / 2
    mean = sum(values) / len(values)
    rise = sum((number - middle) * (value - mean) for number, value in enumerate(values))
    return rise / sum((number - middle) ** 2 for number in range(len(values))) / every_s * 60


class _Killer:
    """What is killed, and brought back."""

    def __init__(self, stack: Stack, random_source: random.Random) -> None:
        self._stack, self._random = stack, random_source
        self.deeds: list[tuple[str, Callable[[], None]]] = [
            ("a worker of Tidegate", self._worker),
            ("connections to Redis", self._connections),
            ("a replica of Redis", self._redis_replica),
            ("a replica of PostgreSQL", self._postgres_replica),
        ]
        self._due: list[tuple[str, Callable[[], None]]] = []

    def next(self) -> tuple[str, Callable[[], None]]:
        # Each once before one comes again, in an order that changes.
        if not self._due:
            self._due = self._random.sample(self.deeds, len(self.deeds))
        return self._due.pop()

    def _worker(self) -> None:
        supervisor = self._stack.instances[-1].process.pid
        workers = [pid for pid in tree_of(supervisor)[1:] if not has_ended(pid)]
        if len(workers) == WORKERS:  # one that was killed before may not be back yet
            os.kill(self._random.choice(workers), signal.SIGKILL)

    def _connections(self) -> None:
        server = self._random.choice(self._stack.cluster.masters())
        server.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    def _redis_replica(self) -> None:
        masters = self._stack.cluster.masters()
        replicas = [each for each in self._stack.cluster.nodes if each not in masters]
        replica = self._random.choice(replicas)
        replica.kill()
        time.sleep(1)
        replica.start()

    def _postgres_replica(self) -> None:
        replica = self._random.choice(self._stack.postgres_standbys())
        replica.kill()
        time.sleep(1)
        replica.start()


async def soak(size: Size) -> Findings:
    """Mixed load for 10 minutes (30 s in smoke) with random kills of workers, connections and replicas."""
    seconds = size.of(600, 30)
    killed: Counter[str] = Counter()
    rss: list[list[float]] = []
    workers = {"TIDEGATE_SERVER__WORKERS": str(WORKERS)}
    with tempfile.TemporaryDirectory() as directory:
        stack = Stack(
            Path(directory),
            policy_of("40/366d"),
            "cluster",
            Sizes(postgres_replicas=size.sizes.postgres_replicas or 1),
            {
                "TIDEGATE_COUNTERS__TIMEOUT_MS": "500",
                "TIDEGATE_BREAKER__OPEN_S": "2",
                "TIDEGATE_LEASES__ENABLED": str(size.leases).lower(),
            },
            each=({}, {}, workers),
        )
        with contextlib.ExitStack() as ending:
            await in_thread(lambda: ending.enter_context(stack))
            killer = _Killer(stack, random.Random(SEED))
            async with Running(stack, RATE, SUBJECTS) as running:

                async def watch() -> None:
                    while running.now_s < seconds:
                        rss.append(await in_thread(lambda: [rss_mib(each.process.pid) for each in stack.instances]))
                        await running.rest(1)

                watching = asyncio.create_task(watch())
                while running.now_s < seconds - PAUSE_S[1]:
                    what, deed = killer.next()
                    running.mark(f"killed: {what}")
                    await in_thread(deed)
                    killed[what] += 1
                    await running.rest(random.Random(len(rss)).uniform(*PAUSE_S))
                await watching
            books = await running.books()
    load = running.load
    failed = Counter(each.failure for each in load.seen if each.failure is not None)
    degraded = sum(each.degraded for each in load.seen)
    settled = rss[len(rss) // 3 :]
    slopes = [slope([each[number] for each in settled]) for number in range(2)]
    undecided, worst = sum(failed.values()), max(slopes)
    unknown = undecided + degraded
    figures = [
        ("checks asked, decided without Redis", f"{len(load.seen):,}, {degraded:,}"),
        ("p50, p99", f"{percentile_ms(load.seen, 0.5):.1f}, {percentile_ms(load.seen, 0.99):.1f} ms"),
        ("longest time without an answer", f"{longest_gap_s(load.seen, 0, running.ended_s):.2f} s"),
        ("kills", ", ".join(f"{count} x {what}" for what, count in sorted(killed.items()))),
        ("checks that a killed worker left without an answer", f"{sum(failed.values())} {dict(failed) or ''}".rstrip()),
        ("resident memory of each instance, first", ", ".join(f"{each:.0f}" for each in rss[0]) + " MiB"),
        ("resident memory of each instance, last", ", ".join(f"{each:.0f}" for each in rss[-1]) + " MiB"),
        ("its slope, of the two that no worker dies in", ", ".join(f"{each:+.2f}" for each in slopes) + " MiB a minute"),
        ("admitted; counted and not admitted", f"{books.admitted:,}; {books.counted_twice:,}"),
    ]
    # HAProxy sends nothing twice that an instance may have decided: what a worker dies over is lost, one check a connection.
    most = 8 * killed["a worker of Tidegate"]
    goals = [
        Goal("checks without a decision", f"{undecided}", f"≤ {most}, 8 a killed worker", undecided <= most),
        none_of("admitted and not counted", books.uncounted),
        Goal("memory's slope, MiB a minute", f"{worst:+.2f}", f"< {LEAK_MIB_A_MINUTE:g}", worst < LEAK_MIB_A_MINUTE, timed=True),
    ]
    if not size.leases:
        # With leases, what a killed worker or a lost connection has leased stays counted as well: it is a figure, not a goal.
        within = books.counted_twice <= unknown
        goals.append(Goal("counted and not admitted", f"{books.counted_twice}", f"≤ {unknown}, calls cut", within))
    return Findings(figures, goals, load.seen, running.marks)


DRILLS: Final = (soak,)
