"""A store that fails some calls and not others: what all instances admit without it stays within the limit once more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.conftest import MOMENT_US
from tests.model.faults import Link, SharedStore, Told
from tests.model.virtual_time import VirtualLoop
from tidegate.breaker import BreakerOptions
from tidegate.counters import Charge, ChargeOutcome, GrantingDecision, degraded, guarded
from tidegate.counters.degraded import GuardOptions
from tidegate.counters.guarded import GuardedCounters
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import Algorithm, Limit, LimitSet

INSTANCES, AMOUNT = 3, 40
EPOCH_US = MOMENT_US - 1_000_000_000
DAY = LimitSet("day", Algorithm.FIXED_WINDOW, [Limit.parse(f"{AMOUNT}/day")], rule="r")


class _HalfWorking(Link):
    """A server that takes debts, and fails the charges for one reason."""

    reason: str | None = None
    absorb_takes_s = 0.0

    async def charge_one(self, charge: Charge, sent_ns: int = 0) -> Decision:
        if self.reason is not None:
            raise StoreUnavailable("failed", reason=self.reason, shard="the one", event=object())
        return await super().charge_one(charge, sent_ns)

    async def charge(self, charges: Sequence[Charge], sent_ns: int = 0) -> list[ChargeOutcome]:
        if self.reason is not None:
            return [StoreUnavailable("failed", reason=self.reason, shard="the one", event=object()) for _ in charges]
        return await super().charge(charges, sent_ns)

    async def absorb(self, states: Any) -> list[StoreUnavailable | None]:
        taken = list(states)
        await asyncio.sleep(self.absorb_takes_s)
        return await super().absorb(taken)


class _Fleet:
    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.store = SharedStore(lambda: loop.now_us() + EPOCH_US)
        self.links = [_HalfWorking(self.store, number, INSTANCES, Told()) for number in range(INSTANCES)]
        options = GuardOptions(breaker=BreakerOptions(failures=1_000_000), min_instances=INSTANCES)
        self.guards = [GuardedCounters(link, options, f"i{number}") for number, link in enumerate(self.links)]  # type: ignore[arg-type]
        for guard in self.guards:
            self.run(guard.start())

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def ask(self, times: int, pause_s: float = 0.02) -> int:
        """Checks by all instances in turn; returns how many were admitted."""
        admitted = 0
        for number in range(times):
            [outcome] = self.run(self.guards[number % INSTANCES].charge([Charge(((DAY, "s"),))]))
            admitted += isinstance(outcome, Decision) and outcome.allowed
            self.run(asyncio.sleep(pause_s))
        return admitted

    def fail(self, reason: str | None) -> None:
        for link in self.links:
            link.reason = reason

    @property
    def counted(self) -> int:
        remaining = self.store.counters.charge_all(((DAY, "s"),), 0).remaining
        assert remaining is not None
        return AMOUNT - remaining


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Fleet]:
    loop = VirtualLoop()
    for module in (guarded, degraded):
        monkeypatch.setattr(module, "time", loop.time_module(EPOCH_US))
    made = _Fleet(loop)
    yield made
    for guard in made.guards:
        made.run(guard.close())
    loop.close()


@pytest.mark.parametrize("reason", ["noscript", "busy", "migrating", "disconnected", "out_of_memory"])
def test_a_store_that_takes_debts_and_fails_charges_admits_the_limit_once(fleet: _Fleet, reason: str) -> None:
    fleet.fail(reason)
    assert 0 < fleet.ask(1_000) <= AMOUNT
    assert fleet.counted <= AMOUNT
    fleet.fail(None)
    admitted = AMOUNT - fleet.counted
    assert fleet.ask(200) == admitted, "what was admitted meanwhile is counted"


def test_a_store_that_fails_now_and_then_admits_little_above_the_limit(fleet: _Fleet) -> None:
    admitted = 0
    for _ in range(50):
        fleet.fail("noscript")
        admitted += fleet.ask(10)
        fleet.fail(None)
        admitted += fleet.ask(10)
    assert AMOUNT <= admitted <= 2 * AMOUNT


def test_where_slots_move_a_stale_answer_is_used_once_not_for_each_check(fleet: _Fleet) -> None:
    """13 of 40 are left: above the reserve of 10 there is one for each of three instances."""
    assert fleet.ask(27) == 27
    fleet.fail("migrating")
    for link in fleet.links:
        link.absorb_takes_s = 0.3
    assert fleet.ask(300) <= 13
    fleet.fail(None)
    assert fleet.ask(100) <= 13
    fleet.run(asyncio.sleep(2))
    assert fleet.counted == AMOUNT


def test_close_to_a_limit_an_outage_admits_a_share_of_what_remained(fleet: _Fleet) -> None:
    """Each instance was answered with 9, 8 or 7 left: of these, three, two and two."""
    assert fleet.ask(33) == 33
    fleet.store.alive = False
    assert fleet.ask(100) == 7
    fleet.store.alive = True
    fleet.run(asyncio.sleep(2))
    assert fleet.ask(100) == 0
    assert fleet.counted == AMOUNT


def test_debts_of_a_reset_counter_leave_its_share_unused(fleet: _Fleet) -> None:
    guard = fleet.guards[0]
    fleet.fail("out_of_memory")
    charge = Charge(((DAY, "s"),))
    assert sum(outcome.allowed for _ in range(30) for outcome in fleet.run(guard.charge([charge]))) == AMOUNT // INSTANCES
    fleet.run(guard.reset([(DAY, "s")]))
    assert not guard.owed
    assert fleet.run(guard.charge([charge]))[0].allowed


def test_what_remained_after_a_lease_is_known_however_much_it_was(fleet: _Fleet) -> None:
    guard, counters = fleet.guards[0], ((DAY, "s"),)
    limit, at_us = DAY.limits[0], fleet.store.clock()
    guard._remember(Charge(counters), Decision(True, limit, 30, 3_600_000_000, 0, at_us, DAY), 0)
    assert guard.late.remaining(counters) is None
    leased = GrantingDecision(True, limit, 30, 3_600_000_000, 0, at_us, DAY, granted=5, ends_us=at_us + 5_000_000)
    guard._remember(Charge(counters), leased, 0)
    assert guard.late.remaining(counters) == 25
