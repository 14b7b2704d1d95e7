"""Holds of counters in memory against a model: opened, renewed, settled with less, as much or more, twice, late, or never."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.conftest import Clock
from tidegate.counters.holds import SETTLED_KNOWN_US, HoldHandle
from tidegate.counters.memory import MemoryCounters
from tidegate.errors import HoldEnded
from tidegate.policy.limits import Algorithm, ConcurrencyAlgorithm, Limit, LimitSet

LIMIT, SLOTS = 100, 3
MINUTE_US = 60_000_000
START_US = 1_700_000_040_000_000
RATE = LimitSet("model", Algorithm.FIXED_WINDOW, [Limit.parse(f"{LIMIT}/minute")])
CONCURRENT = LimitSet("model:slots", ConcurrencyAlgorithm.CONCURRENT, [Limit.parse(f"{SLOTS} concurrent")])
SUBJECTS = ("a", "b")
COSTS = st.integers(0, 60)


class Open(NamedTuple):
    handle: HoldHandle
    subject: str
    cost: int
    window: int
    ends_us: int


class HoldsAgainstModel(RuleBasedStateMachine):
    """A fixed window of a minute and three slots: what a subject may have is counted from what happened, hold by hold."""

    @initialize()
    def begin(self) -> None:
        self.clock = Clock(START_US)
        self.store = MemoryCounters(clock=self.clock)
        self.charged: dict[tuple[str, int], int] = {}
        self.excess: dict[tuple[str, int], int] = {}
        self.open: list[Open] = []
        self.settled: list[tuple[Open, int, bool, int]] = []

    @property
    def window(self) -> int:
        return self.clock() // MINUTE_US

    def counters(self, subject: str) -> tuple[tuple[LimitSet, str], ...]:
        return ((RATE, subject), (CONCURRENT, subject))

    def live(self, subject: str) -> list[Open]:
        return [each for each in self.open if each.subject == subject and each.ends_us > self.clock()]

    def counted(self, subject: str) -> int:
        """Units of the current window: charged, and reserved by holds that were opened in it."""
        here = (subject, self.window)
        return self.charged.get(here, 0) + sum(each.cost for each in self.live(subject) if each.window == self.window)

    def passes(self, subject: str, cost: int) -> bool:
        return (not cost or self.counted(subject) + cost <= LIMIT) and len(self.live(subject)) < SLOTS

    def charge_now(self, subject: str, units: int, above: bool) -> None:
        for book in (self.charged, self.excess) if above else (self.charged,):
            book[subject, self.window] = book.get((subject, self.window), 0) + units

    @rule(subject=st.sampled_from(SUBJECTS), cost=COSTS, ttl_s=st.integers(1, 90))
    def open_hold(self, subject: str, cost: int, ttl_s: int) -> None:
        expected = self.passes(subject, cost)
        decision, handle = self.store.open_hold_now(self.counters(subject), cost, ttl_s * 1_000_000)
        assert decision.allowed == expected == (handle is not None)
        if handle is not None:
            self.open.append(Open(handle, subject, cost, self.window, self.clock() + ttl_s * 1_000_000))

    @rule(subject=st.sampled_from(SUBJECTS), cost=COSTS)
    def check(self, subject: str, cost: int) -> None:
        expected = not cost or self.passes(subject, cost)
        assert self.store.charge_all(self.counters(subject), cost).allowed == expected
        if expected:
            self.charge_now(subject, cost, above=False)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 9), used=st.one_of(st.none(), COSTS, st.integers(100, 300)))
    def settle(self, which: int, used: int | None) -> None:
        hold = self.open.pop(which % len(self.open))
        used = hold.cost if used is None else used
        late = hold.ends_us <= self.clock()
        answer = self.store.settle_hold_now(hold.handle, used)
        assert (answer.cost, answer.late, answer.repeated) == (used, late, False)
        if late:
            self.charge_now(hold.subject, used, above=True)
        else:
            # What was reserved stays in the window it was charged in; only the excess is charged now.
            key = (hold.subject, hold.window)
            self.charged[key] = self.charged.get(key, 0) + min(used, hold.cost)
            self.charge_now(hold.subject, max(used - hold.cost, 0), above=True)
        self.settled.append((hold, used, late, self.clock() + SETTLED_KNOWN_US))

    @precondition(lambda self: self.settled)
    @rule(which=st.integers(0, 9), used=COSTS)
    def settle_again(self, which: int, used: int) -> None:
        hold, charged, late, known_until_us = self.settled[-1 - which % min(len(self.settled), 3)]
        if self.clock() < known_until_us:
            answer = self.store.settle_hold_now(hold.handle, used)
            assert (answer.cost, answer.late, answer.repeated) == (charged, late, True)
            with pytest.raises(HoldEnded):
                self.store.renew_hold_now(hold.handle, 1_000_000)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 9), ttl_s=st.integers(1, 90))
    def renew(self, which: int, ttl_s: int) -> None:
        place = which % len(self.open)
        hold = self.open[place]
        if hold.ends_us <= self.clock():
            with pytest.raises(HoldEnded):
                self.store.renew_hold_now(hold.handle, ttl_s * 1_000_000)
        else:
            self.store.renew_hold_now(hold.handle, ttl_s * 1_000_000)
            self.open[place] = hold._replace(ends_us=self.clock() + ttl_s * 1_000_000)

    @rule(us=st.one_of(st.integers(0, 90_000_000), st.sampled_from([1_000_000, MINUTE_US])))
    def wait(self, us: int) -> None:
        self.clock.now_us += us

    @invariant()
    def limits_hold(self) -> None:
        for subject in SUBJECTS:
            counted, taken = self.counted(subject), len(self.live(subject))
            assert taken <= SLOTS
            assert counted <= LIMIT + self.excess.get((subject, self.window), 0)
            assert self.store.charge_all(((RATE, subject),), 0).remaining == max(LIMIT - counted, 0)
            assert self.store.charge_all(((CONCURRENT, subject),), 0).remaining == SLOTS - taken
            assert self.store.open_holds_of(RATE, subject) == taken

    def teardown(self) -> None:
        """Whoever died with holds open costs nothing for longer than they last."""
        if not hasattr(self, "clock"):
            return
        self.clock.now_us += 2 * 90_000_000
        for subject in SUBJECTS:
            assert self.store.charge_all(((RATE, subject),), 0).remaining == LIMIT
            assert self.store.charge_all(((CONCURRENT, subject),), 0).remaining == SLOTS
        assert self.store.open_holds == 0


TestHoldsAgainstModel = HoldsAgainstModel.TestCase
TestHoldsAgainstModel.settings = settings(max_examples=60, stateful_step_count=30)
