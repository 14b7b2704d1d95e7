"""Holds while the store is killed and a replica takes its place, against the model of `test_holds_model`, in virtual time.

The store is the twin in memory; between it and the test is what instances put there, `GuardedHolds`. A replica has what the store
had when it was last copied: after a failover the model is as of then, too, and store and model must agree exactly again.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Coroutine
from typing import Any, NamedTuple, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from tests.conftest import Clock
from tests.unit.test_holds_model import CONCURRENT, COSTS, RATE, SUBJECTS, HoldsAgainstModel, Open
from tidegate.counters import Charge, ChargeOutcome, Counters
from tidegate.counters.guarded_holds import GuardedHolds
from tidegate.counters.holds import HoldHandle, HoldSettlement
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Decision
from tidegate.errors import HoldNotFound, StoreUnavailable

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "60"))
STEPS = int(os.environ.get("MODEL_STEPS", "40"))
INSTANCES = 3
T = TypeVar("T")


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """The result of what never waits."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    raise AssertionError("counters in memory never wait")


class FailingStore:
    """A store that is killed, or whose answers are lost, and the guard before it; the methods of `MemoryCounters` that tests use.

    Args:
        clock: of the store.
    """

    def __init__(self, clock: Clock) -> None:
        self.counters = MemoryCounters(clock=clock)
        self.alive = True
        self.loses_answer = False
        self.opened: HoldHandle | None = None
        self._fallback = MemoryCounters(clock=clock)
        self.guard = GuardedHolds(self, self._admit, self._failed, lambda _: None, lambda: None)

    async def _admit(self, charge: Charge, started_us: int) -> ChargeOutcome | None:
        return None

    def _failed(self, charge: Charge, error: StoreUnavailable, started_us: int) -> ChargeOutcome:
        return self._fallback.charge_all(charge.counters[:1], charge.cost)

    def _arrives(self) -> None:
        if not self.alive:
            raise StoreUnavailable("killed", reason="disconnected")

    def _answers(self, answer: T) -> T:
        if self.loses_answer:
            raise StoreUnavailable("killed before it answered", reason="timeout")
        return answer

    async def open_hold(
        self, counters: Counters, cost: int, ttl_us: int, rule: str | None = None
    ) -> tuple[Decision, HoldHandle | None]:
        self._arrives()
        opened = self.counters.open_hold_now(counters, cost, ttl_us, rule)
        self.opened = opened[1]
        return self._answers(opened)

    async def settle_hold(self, handle: HoldHandle, cost: int, success: bool = False) -> HoldSettlement:
        self._arrives()
        return self._answers(self.counters.settle_hold_now(handle, cost, success))

    async def adjust(self, counters: Counters, units: int) -> Decision:
        self._arrives()
        return self._answers(self.counters.adjust_now(counters, units))

    def open_hold_now(self, counters: Counters, cost: int, ttl_us: int) -> tuple[Decision, HoldHandle | None]:
        return at_once(self.guard.open(counters, cost, ttl_us, None))

    def settle_hold_now(self, handle: HoldHandle, cost: int) -> HoldSettlement:
        return at_once(self.settle_hold(handle, cost))

    def renew_hold_now(self, handle: HoldHandle, ttl_us: int) -> None:
        self._arrives()
        self.counters.renew_hold_now(handle, ttl_us)

    def charge_all(self, counters: Counters, cost: int) -> Decision:
        self._arrives()
        return self.counters.charge_all(counters, cost)

    def open_holds_of(self, limits: Any, subject: str) -> int:
        return self.counters.open_holds_of(limits, subject)

    @property
    def open_holds(self) -> int:
        return self.counters.open_holds


class Replica(NamedTuple):
    """What a replica has, and what the model knew then."""

    counters: MemoryCounters
    charged: dict[tuple[str, int], int]
    excess: dict[tuple[str, int], int]
    open: list[Open]
    orphans: list[Open]
    settled: list[tuple[Open, int, bool, int]]


def is_alive(machine: HoldsOverFailures) -> bool:
    return machine.store.alive


def has_open(machine: HoldsOverFailures) -> bool:
    return machine.store.alive and bool(machine.open)


class HoldsOverFailures(HoldsAgainstModel):
    """Three instances before a store that dies; `in_step` where the replica has everything when it does."""

    store: FailingStore  # type: ignore[assignment]

    @initialize(in_step=st.booleans())
    def begin(self, in_step: bool) -> None:  # type: ignore[override]
        HoldsAgainstModel.begin(self)
        self.store = FailingStore(self.clock)
        self.orphans: list[Open] = []
        """Open holds that nobody will settle."""
        self.lost: list[HoldHandle] = []
        """Those that the store does not know any more."""
        self.owners: dict[str, int] = {}
        self.in_step = in_step
        self.copy_store()

    def live(self, subject: str) -> list[Open]:
        return [each for each in (*self.open, *self.orphans) if each.subject == subject and each.ends_us > self.clock()]

    def copy_store(self) -> None:
        # Limit sets are compared by identity.
        kept: dict[int, Any] = {id(each): each for each in (self.clock, RATE, CONCURRENT)}
        counters = copy.deepcopy(self.store.counters, kept)
        books = dict(self.charged), dict(self.excess), list(self.open), list(self.orphans), list(self.settled)
        self.replica = Replica(counters, *books)

    @precondition(is_alive)
    @rule(subject=st.sampled_from(SUBJECTS), cost=COSTS, ttl_s=st.integers(1, 90), owner=st.integers(0, INSTANCES - 1))
    def open_hold(self, subject: str, cost: int, ttl_s: int, owner: int = 0) -> None:
        before = len(self.open)
        HoldsAgainstModel.open_hold(self, subject=subject, cost=cost, ttl_s=ttl_s)
        for hold in self.open[before:]:
            self.owners[hold.handle.id] = owner

    @precondition(is_alive)
    @rule(subject=st.sampled_from(SUBJECTS), cost=COSTS)
    def check(self, subject: str, cost: int) -> None:
        HoldsAgainstModel.check(self, subject=subject, cost=cost)

    @precondition(has_open)
    @rule(which=st.integers(0, 9), used=st.one_of(st.none(), COSTS, st.integers(100, 300)), unanswered=st.booleans())
    def settle(self, which: int, used: int | None, unanswered: bool = False) -> None:
        if unanswered:
            # It is settled, and nobody hears of it; trying again settles nothing more.
            hold = self.open[which % len(self.open)]
            self.store.loses_answer = True
            with pytest.raises(StoreUnavailable):
                self.store.settle_hold_now(hold.handle, hold.cost if used is None else used)
            self.store.loses_answer = False
            answers = self.store.counters.settle_hold_now(hold.handle, 1)
            assert (answers.cost, answers.repeated) == (hold.cost if used is None else used, True)
            self.account(self.open.pop(which % len(self.open)), answers.cost)
            return
        HoldsAgainstModel.settle(self, which=which, used=used)

    def account(self, hold: Open, used: int) -> None:
        """What a settlement changes."""
        if hold.ends_us <= self.clock():
            self.charge_now(hold.subject, used, above=True)
        else:
            key = (hold.subject, hold.window)
            self.charged[key] = self.charged.get(key, 0) + min(used, hold.cost)
            self.charge_now(hold.subject, max(used - hold.cost, 0), above=True)

    @precondition(lambda self: is_alive(self) and self.settled)
    @rule(which=st.integers(0, 9), used=COSTS)
    def settle_again(self, which: int, used: int) -> None:
        HoldsAgainstModel.settle_again(self, which=which, used=used)

    @precondition(has_open)
    @rule(which=st.integers(0, 9), ttl_s=st.integers(1, 90))
    def renew(self, which: int, ttl_s: int) -> None:
        HoldsAgainstModel.renew(self, which=which, ttl_s=ttl_s)

    @precondition(is_alive)
    @rule(subject=st.sampled_from(SUBJECTS), cost=COSTS, ttl_s=st.integers(1, 90))
    def open_unanswered(self, subject: str, cost: int, ttl_s: int) -> None:
        """It is open, and nobody knows its id."""
        expected = self.passes(subject, cost)
        self.store.loses_answer, self.store.opened = True, None
        _, handle = self.store.open_hold_now(self.counters(subject), cost, ttl_s * 1_000_000)
        self.store.loses_answer = False
        assert handle is None or not handle.counted
        assert (self.store.opened is not None) == expected
        if self.store.opened is not None:
            ends_us = self.clock() + ttl_s * 1_000_000
            self.orphans.append(Open(self.store.opened, subject, cost, self.window, ends_us))

    @rule(owner=st.integers(0, INSTANCES - 1))
    def instance_dies(self, owner: int) -> None:
        self.orphans += [each for each in self.open if self.owners.get(each.handle.id) == owner]
        self.open = [each for each in self.open if self.owners.get(each.handle.id) != owner]

    @precondition(is_alive)
    @rule()
    def replicate(self) -> None:
        self.copy_store()

    @precondition(is_alive)
    @rule()
    def kill(self) -> None:
        if self.in_step:
            self.copy_store()
        self.store.alive = False

    @precondition(lambda self: not self.store.alive)
    @rule(subject=st.sampled_from(SUBJECTS), cost=COSTS, which=st.integers(0, 9))
    def work_while_it_is_away(self, subject: str, cost: int, which: int) -> None:
        """What the fallback admits reserves nothing; nothing can be settled or renewed, and trying changes nothing."""
        decision, handle = self.store.open_hold_now(self.counters(subject), cost, 60_000_000)
        assert decision.allowed == (handle is not None)
        assert handle is None or not handle.counted
        if self.open:
            hold = self.open[which % len(self.open)]
            with pytest.raises(StoreUnavailable):
                self.store.settle_hold_now(hold.handle, cost)
            with pytest.raises(StoreUnavailable):
                self.store.renew_hold_now(hold.handle, 60_000_000)

    @precondition(lambda self: not self.store.alive)
    @rule()
    def promote(self) -> None:
        kept = self.replica
        known = {each.handle.id for each in (*kept.open, *kept.orphans)} | {each[0].handle.id for each in kept.settled}
        self.lost += [each.handle for each in (*self.open, *self.orphans) if each.handle.id not in known]
        # Those of instances that died since are settled by nobody.
        alive = {each.handle.id for each in self.open}
        settled = {each[0].handle.id for each in self.settled}
        self.store.counters = kept.counters
        self.charged, self.excess, self.settled = dict(kept.charged), dict(kept.excess), list(kept.settled)
        self.open = [each for each in kept.open if each.handle.id in alive | settled]
        self.orphans = [*kept.orphans, *(each for each in kept.open if each.handle.id not in alive | settled)]
        self.store.alive = True
        if self.in_step:
            assert not self.lost
        self.copy_store()

    @precondition(lambda self: is_alive(self) and self.lost)
    @rule(which=st.integers(0, 9), used=COSTS)
    def settle_a_lost_one(self, which: int, used: int) -> None:
        """Also where another hold has its place: none but its own is freed."""
        handle = self.lost[which % len(self.lost)]
        with pytest.raises(HoldNotFound):
            self.store.settle_hold_now(handle, used)
        with pytest.raises(HoldNotFound):
            self.store.renew_hold_now(handle, 60_000_000)

    @invariant()
    def limits_hold(self) -> None:
        if self.store.alive:
            HoldsAgainstModel.limits_hold(self)

    def teardown(self) -> None:
        if not hasattr(self, "clock"):
            return
        if not self.store.alive:
            self.promote()
        HoldsAgainstModel.teardown(self)


TestHoldsOverFailures = HoldsOverFailures.TestCase
TestHoldsOverFailures.settings = settings(max_examples=EXAMPLES, stateful_step_count=STEPS)
