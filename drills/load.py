"""Instances that ask at a steady rate, and what they saw."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple

from drills.admissions import Admission, admission_of
from drills.exactness import prove
from tidegate.breaker import BreakerOptions
from tidegate.counters import Charge, CounterStore
from tidegate.counters.degraded import GuardOptions
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.leased import LeasedCounters
from tidegate.counters.redis.store import RedisCounters
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import Algorithm, Limit, LimitSet, OnFailure

CALM_S: Final = 1.0
"""A store is back when no check was degraded for so long."""
MAX_S: Final = 90.0
LEASES: Final = [False]
"""Whether the instances of a `Load` lease, where it does not say."""

Event = tuple[float, Callable[[], Awaitable[object]]]
"""When, in seconds from the start, and what is done to the servers."""


class Seen(NamedTuple):
    """One check.

    Args:
        at_s: since the start.
        allowed: the answer; False where there was none.
        degraded: whether the store was away.
        latency_s: of the check.
        error: the reason, where the answer was an error.
    """

    at_s: float
    subject: str
    allowed: bool
    degraded: bool
    latency_s: float
    error: str | None


class Load:
    """Some instances on one Redis.

    Args:
        amount: what each subject may have; the window is a year, so that nothing is given back meanwhile.
        subjects: how many take turns.
        rate: checks a second, of all instances together.
        timeout_s: of a check.
        breaker: of each instance.
        on_failure: of the rule.
        leases: whether units are leased; as `LEASES` says where None.
    """

    def __init__(
        self,
        url: str,
        instances: int = 3,
        amount: int = 40,
        subjects: int = 60,
        rate: int = 900,
        algorithm: Algorithm = Algorithm.FIXED_WINDOW,
        timeout_s: float = 0.05,
        breaker: BreakerOptions | None = None,
        on_failure: OnFailure = OnFailure.LOCAL,
        leases: bool | None = None,
    ) -> None:
        self.amount = amount
        self.seen: list[Seen] = []
        self.answers: list[Admission] = []
        """The same, as the checker reads it; answers only."""
        self.counted: dict[str, int] = {}
        """What the store had counted at the end, by subject."""
        self.subjects = [f"subject-{number}" for number in range(subjects)]
        self.limits = LimitSet("drill", algorithm, [Limit.parse(f"{amount}/366d")], on_failure, rule="drill")
        self.stores = [
            GuardedCounters(
                RedisCounters(url, timeout_s),
                GuardOptions(breaker=breaker or BreakerOptions(open_s=2.0), min_instances=instances),
            )
            for _ in range(instances)
        ]
        self.leased = [LeasedCounters(store) for store in self.stores] if (LEASES[0] if leases is None else leases) else []
        self._rate = rate
        self._started = self._calm_from_s = 0.0

    async def run(self, seconds: float, events: Sequence[Event] = ()) -> None:
        """Ask for some time, let the events happen, and go on until checks are decided by the store again.

        Args:
            seconds: how long at least; a second more than the last degraded check, and `MAX_S` at most.
            events: what happens meanwhile.
        """
        await asyncio.gather(*(store.start() for store in self.stores))
        # One check a store, not counted: the scripts are loaded and the heartbeats known before anything is measured.
        warm = LimitSet("drill:warm", Algorithm.FIXED_WINDOW, [Limit.parse("1000000/366d")])
        for store in self.stores:
            await store.charge([Charge(((warm, "warm"),))])
        self._started = time.monotonic()
        happening = [asyncio.ensure_future(self._happen(*event)) for event in events]
        asking: set[asyncio.Task[None]] = set()
        number = 0
        while (passed := time.monotonic() - self._started) < seconds or (
            passed < MAX_S and (passed < self._calm_from_s or not all(event.done() for event in happening))
        ):
            # So many are due by now: a late loop catches up, and does not lower the rate.
            while number < passed * self._rate:
                # Every instance asks about every subject: the turns of the two are shifted against each other.
                stores: Sequence[CounterStore] = self.leased or self.stores
                asked = stores[(number + number // len(self.subjects)) % len(stores)]
                subject = self.subjects[number % len(self.subjects)]
                task = asyncio.ensure_future(self._ask(asked, subject))
                asking.add(task)
                task.add_done_callback(asking.discard)
                number += 1
            await asyncio.sleep(0.002)
        await asyncio.gather(*happening, *asking)

    async def settle(self) -> None:
        """Wait until nothing is owed to the store, and ask it what it has counted."""
        deadline = time.monotonic() + 10
        for leased in self.leased:
            await leased.give_back()
        while any(store.owed or len(store.late) for store in self.stores) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        # The same counter under a limit that leaves room: what is left says what was counted.
        roomy = LimitSet(self.limits.name, self.limits.algorithm, [Limit.parse("1000000000/366d")])
        for subject in self.subjects:
            outcome = (await self.stores[0].charge([Charge(((roomy, subject),), 0)]))[0]
            while isinstance(outcome, StoreUnavailable) or outcome.degraded:
                if time.monotonic() > deadline + 10:
                    break
                await asyncio.sleep(0.05)
                outcome = (await self.stores[0].charge([Charge(((roomy, subject),), 0)]))[0]
            if isinstance(outcome, StoreUnavailable) or outcome.degraded or outcome.remaining is None:
                raise RuntimeError(f"the store cannot be asked what it counted: {outcome}")
            self.counted[subject] = 1_000_000_000 - outcome.remaining

    async def close(self) -> None:
        """End the instances."""
        stores: Sequence[CounterStore] = self.leased or self.stores
        for store in stores:
            await store.close()

    @property
    def over_admitted(self) -> int:
        """Units admitted above the limits, all subjects together."""
        return sum(max(count - self.amount, 0) for count in self._admitted().values())

    def excess(self) -> tuple[int, int]:
        """What the checker finds above the limits, all subjects together.

        Returns:
            Units of all that was admitted, and of what the store alone admitted.
        """
        reports = prove(self.answers, lambda _name, _subject: self.limits)
        return sum(each.excess_units for each in reports), sum(each.store_excess_units for each in reports)

    @property
    def uncounted(self) -> int:
        """Units admitted that the store does not know: lost with a master or a flush."""
        return sum(max(count - self.counted[subject], 0) for subject, count in self._admitted().items())

    @property
    def counted_twice(self) -> int:
        """Units that the store counted and nobody was admitted for: answers that came too late, debts paid again."""
        admitted = self._admitted()
        return sum(max(count - admitted[subject], 0) for subject, count in self.counted.items())

    @property
    def degraded(self) -> list[Seen]:
        """Checks decided without the store."""
        return [each for each in self.seen if each.degraded]

    @property
    def errors(self) -> Counter[str]:
        """Checks without an answer, by reason."""
        return Counter(each.error for each in self.seen if each.error is not None)

    @property
    def back_after_s(self) -> float:
        """When the last degraded check was, seconds since the start; 0 where there was none."""
        return max((each.at_s for each in self.degraded), default=0.0)

    def latency_ms(self, quantile: float, since_s: float = 0.0, until_s: float = float("inf")) -> float:
        """A quantile of the checks asked between two moments, ms.

        Args:
            quantile: 0 to 1.
            since_s: of the first moment, s since the start.
            until_s: of the last.
        """
        latencies = sorted(each.latency_s for each in self.seen if since_s <= each.at_s < until_s)
        if len(latencies) < 2:
            return 0.0
        return statistics.quantiles(latencies, n=1000, method="inclusive")[min(round(quantile * 1000), 999) - 1] * 1000

    def _admitted(self) -> Counter[str]:
        return Counter(each.subject for each in self.seen if each.allowed)

    async def _ask(self, store: CounterStore, subject: str) -> None:
        started, sent_us = time.monotonic(), time.time_ns() // 1000
        outcome = (await store.charge([Charge(((self.limits, subject),))]))[0]
        latency_s = time.monotonic() - started
        at_s = started - self._started
        if isinstance(outcome, StoreUnavailable) or outcome.degraded:
            self._calm_from_s = at_s + latency_s + CALM_S
        if isinstance(outcome, StoreUnavailable):
            self.seen.append(Seen(at_s, subject, False, True, latency_s, str(outcome.details.get("reason", outcome))))
        else:
            self.seen.append(Seen(at_s, subject, outcome.allowed, outcome.degraded, latency_s, None))
            # The length of a check by the clock that is not stepped.
            self.answers.append(admission_of(outcome, subject, 1, sent_us, sent_us + round(latency_s * 1e6)))

    async def _happen(self, at_s: float, event: Callable[[], Awaitable[object]]) -> None:
        await asyncio.sleep(at_s)
        await event()
