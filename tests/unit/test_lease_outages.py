"""What failures of the store admit above a limit: with leases no more than without, for each kind of failure.

Three instances in virtual time; the same checks and the same failure run with and without leases.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, NamedTuple

import pytest

from tests.conftest import MOMENT_US
from tests.model.faults import Fault
from tests.model.lease_link import LeasingLink, LeasingStore
from tests.model.virtual_time import VirtualLoop
from tidegate.breaker import BreakerOptions
from tidegate.counters import Charge, degraded, guarded, leased
from tidegate.counters.degraded import GuardOptions
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.leased import LeasedCounters
from tidegate.decision import Decision
from tidegate.policy.limits import Algorithm, Limit, LimitSet

INSTANCES, AMOUNT, SUBJECTS, RATE = 3, 40, 4, 60
SEEDS = int(os.environ.get("MODEL_EXAMPLES", "8"))
EPOCH_US = MOMENT_US - 1_000_000_000
LAG_S = 0.1
BEGINS_S = 1.0


class Run(NamedTuple):
    """What a run admitted.

    Args:
        admitted: units, by subject.
        leased: checks decided from leases.
        lost: units that a replica did not have when it took over, all subjects together.
    """

    admitted: Counter[str]
    leased: int
    lost: int

    @property
    def above(self) -> int:
        """Units above the limits, all subjects together."""
        return sum(max(units - AMOUNT, 0) for units in self.admitted.values())


class Fleet:
    """Instances on one store."""

    def __init__(self, loop: VirtualLoop, seed: int, leases: bool) -> None:
        self.random = Random(seed)
        self.loop = loop
        self.store = LeasingStore(lambda: self.loop.now_us() + EPOCH_US)
        self.links = [LeasingLink(self.store, number, INSTANCES, Random(seed + number)) for number in range(INSTANCES)]
        options = GuardOptions(breaker=BreakerOptions(open_s=2.0), min_instances=INSTANCES)
        self.guards = [GuardedCounters(link, options, f"i{number}") for number, link in enumerate(self.links)]  # type: ignore[arg-type]
        self.leased = [LeasedCounters(guard) for guard in self.guards] if leases else []
        self.limits = LimitSet("day", Algorithm.FIXED_WINDOW, [Limit.parse(f"{AMOUNT}/day")], rule="r")
        self.admitted: Counter[str] = Counter()
        self.lost = 0

    async def ask(self, store: Any, subject: str) -> None:
        [outcome] = await store.charge([Charge(((self.limits, subject),))])
        self.admitted[subject] += isinstance(outcome, Decision) and outcome.allowed

    async def run(self, failure: Callable[[Fleet], Awaitable[None]], seconds: float) -> Run:
        for guard in self.guards:
            await guard.start()
        await asyncio.sleep(0.01)
        failing = asyncio.ensure_future(failure(self))
        asking = []
        for _ in range(round(seconds * RATE)):
            store = self.random.choice(self.leased or self.guards)
            asking.append(asyncio.ensure_future(self.ask(store, f"s{self.random.randrange(SUBJECTS)}")))
            await asyncio.sleep(1 / RATE)
        await asyncio.gather(failing, *asking)
        for each in self.leased or self.guards:
            await each.close()
        return Run(self.admitted, sum(each.table.decisions for each in self.leased), self.lost)


async def nothing(fleet: Fleet) -> None:
    """For comparison."""


async def gone(fleet: Fleet) -> None:
    """Killed; after 1.5 s an empty server takes its place."""
    await asyncio.sleep(BEGINS_S)
    fleet.store.alive = False
    await asyncio.sleep(1.5)
    fleet.store.replace({})


async def hung(fleet: Fleet) -> None:
    """Stopped for 2 s, then all that was sent is executed."""
    await asyncio.sleep(BEGINS_S)
    fleet.store.hung = []
    await asyncio.sleep(2)
    fleet.store.resume()


async def clients_killed(fleet: Fleet) -> None:
    """All connections are lost, three times."""
    await asyncio.sleep(BEGINS_S)
    for _ in range(3):
        for link in fleet.links:
            link.fault, link.connection = Fault.DOWN, link.connection + 1
        await asyncio.sleep(0.1)
        for link in fleet.links:
            link.fault = Fault.NONE
        await asyncio.sleep(0.6)


async def failed_over(fleet: Fleet) -> None:
    """Killed; a replica that was behind takes over after 1.5 s."""
    await asyncio.sleep(BEGINS_S)
    fleet.store.replicate()
    await asyncio.sleep(LAG_S)
    kept, now = fleet.store._behind, fleet.store.leases.states
    fleet.lost = sum(state[1] - (kept[key][1] if key in kept else 0) for key, state in now.items())
    fleet.store.alive = False
    await asyncio.sleep(1.5)
    for link in fleet.links:
        link.connection += 1
    fleet.store.fail_over()


async def slots_moved(fleet: Fleet) -> None:
    """For 3 s half of the calls find their slot on its way."""
    await asyncio.sleep(BEGINS_S)
    for link in fleet.links:
        link.moving = 0.5
    await asyncio.sleep(3)
    for link in fleet.links:
        link.moving = 0.0


def run(monkeypatch: pytest.MonkeyPatch, failure: Callable[[Fleet], Awaitable[None]], seed: int, leases: bool) -> Run:
    loop = VirtualLoop()
    # Before anything is made: the estimate of the store's clock begins with the clock of the moment.
    for module in (guarded, degraded, leased):
        monkeypatch.setattr(module, "time", loop.time_module(EPOCH_US))
    fleet = Fleet(loop, seed, leases)
    for store in fleet.leased:
        store.table._clock_ns = guarded.time.monotonic_ns
    try:
        return loop.run_until_complete(fleet.run(failure, 7.0))
    finally:
        loop.close()


BOUNDS = {
    "nothing": 0,
    # The limit once more: what was charged in the lost store, leased units included, was at most the limit.
    "gone": SUBJECTS * AMOUNT,
    "hung": SUBJECTS * INSTANCES * (AMOUNT // INSTANCES),
    "clients_killed": SUBJECTS * INSTANCES * (AMOUNT // INSTANCES),
    "failed_over": SUBJECTS * INSTANCES * (AMOUNT // INSTANCES),
    "slots_moved": SUBJECTS * (AMOUNT // 4),
}
"""Units above the limits at most, as docs/leases.md derives them; for a failover without those that the replica lacked."""


@pytest.mark.parametrize("name", BOUNDS)
def test_no_more_than_without_leases(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    failure: Callable[[Fleet], Awaitable[None]] = globals()[name]
    without, leasing = ([run(monkeypatch, failure, seed, leases) for seed in range(SEEDS)] for leases in (False, True))
    for each in (*without, *leasing):
        assert each.above - each.lost <= BOUNDS[name]
    assert all(each.leased > INSTANCES * SUBJECTS for each in leasing), "many were decided from leases"
    assert all(units >= AMOUNT // 2 for each in leasing for units in each.admitted.values()), "leases may be lost"
    # An empty server admits the limit once more: above it is what the lost one had charged, leased units that were not used yet
    # included.
    if failure is not gone:
        assert sum(each.above for each in leasing) <= sum(each.above for each in without)


def test_what_was_used_of_leases_uses_up_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = VirtualLoop()
    for module in (guarded, degraded, leased):
        monkeypatch.setattr(module, "time", loop.time_module(EPOCH_US))
    fleet = Fleet(loop, 1, leases=True)
    store, guard = fleet.leased[0], fleet.guards[0]
    store.table._clock_ns = guarded.time.monotonic_ns
    share = AMOUNT // INSTANCES

    async def ask_until_denied() -> None:
        await guard.start()
        await asyncio.sleep(0.01)
        while not store.table.leases:
            await fleet.ask(store, "s")
        charged = fleet.admitted["s"]
        fleet.store.alive = False
        units = store.table.units
        assert 0 < units < share
        for _ in range(AMOUNT):
            await fleet.ask(store, "s")
        assert fleet.admitted["s"] - charged <= share, "lease and share together"
        assert guard.owed == 1, "only what was not leased is owed"
        fleet.store.alive = True
        await asyncio.sleep(5)
        before = fleet.admitted["s"]
        await fleet.ask(store, "s")
        assert fleet.admitted["s"] == before + 1
        assert store.table.usage(((fleet.limits, "s"),)) <= 1, "the store decided a check since"
        await store.close()

    try:
        loop.run_until_complete(ask_until_denied())
    finally:
        loop.close()
