"""Leases never admit more than a limit: instances lease at random, messages are delayed, lost and doubled, clocks are wrong.

What was admitted is held against the promise of each algorithm by the checker of the drills, which shares no code with them.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import pytest
from drills.admissions import Admission
from drills.exactness import prove
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.cases.quotas import quotas_of
from tests.model.lease_store import LeaseStore
from tidegate.algorithms.leases import Ahead
from tidegate.counters import Charge, LeaseRequest
from tidegate.counters.lease_table import LeaseTable
from tidegate.decision import Decision
from tidegate.policy.limits import Algorithm, AnyAlgorithm, Limit, LimitSet, QuotaAlgorithm

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "30"))
AMOUNTS = st.sampled_from([1, 5, 30, 100, 1_000])
STEPS = int(os.environ.get("MODEL_STEPS", "60"))
START_US = 1_700_000_000_000_000 // 60_000_000 * 60_000_000
TTL_US = 5_000_000
LEASED = [algorithm for algorithm in Algorithm if algorithm is not Algorithm.SLIDING_LOG]
PERIODS = {"second": "second", "7s": "hour", "minute": "minute"}
"""Quotas in place of limits per window."""
LEASED_DECISIONS: dict[Algorithm, int] = defaultdict(int)
AHEAD_DECISIONS = [0]
DRIFTS = (999_000, 999_500, 1_000_000, 1_000_700, 1_001_000)
"""How many µs of an instance's clock pass in a true second."""


class _Instance:
    """An instance of which only the leases are run."""

    def __init__(self, machine: LeaseMachine, drift: int) -> None:
        self.machine, self.drift, self.since_us = machine, drift, machine.now_us
        self.table = LeaseTable(TTL_US, 100, self.clock_ns)
        self.cleared = True

    def clock_ns(self) -> int:
        return (self.machine.now_us - self.since_us) * self.drift // 1000 + 1


class LeaseMachine(RuleBasedStateMachine):
    """Four instances, one or two limit sets, two subjects."""

    algorithm: Algorithm
    tier_algorithm: AnyAlgorithm | None = None
    """Of the tier's set; one at random, or none, where None."""
    reached = False
    """Whether the only limit is reached when it begins, by the window before: then units are leased before they come free."""

    @initialize(
        amount=AMOUNTS,
        windows=st.lists(st.sampled_from(["second", "7s", "minute"]), min_size=1, max_size=2, unique=True),
        burst=AMOUNTS,
        tier=st.none() | st.sampled_from(LEASED),
        drifts=st.lists(st.sampled_from(DRIFTS), min_size=4, max_size=4),
    )
    def begin(self, amount: int, windows: list[str], burst: int, tier: AnyAlgorithm | None, drifts: list[int]) -> None:
        self.now_us = START_US
        self.store = LeaseStore(lambda: self.now_us)
        self.windows = ["minute"] if self.reached else windows
        self.tier = None if self.reached else self.tier_algorithm or tier
        self.most: dict[str, tuple[int, int]] = {}
        amount = 100 if self.reached else amount
        self.change(amount, burst)
        self.instances = [_Instance(self, drift) for drift in drifts]
        self.requests: list[tuple[_Instance, Charge, LeaseRequest, int]] = []
        self.replies: list[tuple[_Instance, Charge, LeaseRequest, int, Decision]] = []
        self.returns: list[Any] = []
        self.admitted: list[Admission] = []
        self.claimed: list[Admission] = []
        self.resets: dict[str, int] = defaultdict(int)
        self.reset_us: dict[str, int] = {}
        if self.reached:
            for subject in "ab":
                self._process_at_once(subject, amount)
            self.now_us += 60_000_000

    def _set(self, name: str, algorithm: AnyAlgorithm, amount: int, burst: int) -> LimitSet:
        text = f" burst {burst}" if algorithm.is_bucket else ""
        most = self.most.get(name, (0, 0))
        self.most[name] = (max(most[0], amount), max(most[1], burst))
        if algorithm is QuotaAlgorithm.QUOTA:
            quotas = quotas_of(tuple(f"{amount}/{PERIODS[window]}" for window in self.windows))
            return LimitSet(name, algorithm, quotas.limits)
        return LimitSet(name, algorithm, [Limit.parse(f"{amount}/{window}{text}") for window in self.windows])

    def change(self, amount: int, burst: int) -> None:
        """Other limits of the same names: what was consumed is kept, and leases of the old ones are no longer found."""
        self.sets = [self._set("rule", self.algorithm, amount, burst)]
        if self.tier is not None:
            self.sets.append(self._set("tier", self.tier, amount + 5, burst + 3))

    @rule(
        us=st.one_of(
            st.integers(0, 100_000),
            st.integers(0, 2_000_000),
            st.integers(0, 9_000_000),
            st.sampled_from([1_000, 20_000, 4_999_000, 5_001_000]),
        )
    )
    def wait(self, us: int) -> None:
        self.now_us += us % 2_000_000 if self.reached else us

    @rule(
        before_us=st.sampled_from([0, 1, 500, 1_500, 8_000, 100_000]),
        window_us=st.sampled_from([1_000_000, 7_000_000, 60_000_000]),
    )
    def wait_for_an_edge(self, before_us: int, window_us: int) -> None:
        if self.reached and before_us:
            return
        edge_us = self.now_us // window_us * window_us + window_us
        self.now_us = max(edge_us - before_us, self.now_us)

    @rule(
        number=st.integers(0, 3),
        cost=st.integers(1, 4),
        times=st.integers(1, 40),
        subject=st.sampled_from("ab"),
        answered=st.sampled_from([True, True, True, False]),
    )
    def check(self, number: int, cost: int, times: int, subject: str, answered: bool) -> None:
        """Some checks; where a lease does not decide them the store is asked, which answers at once or later."""
        if self.reached:
            # Fewer, so that each comes again while it has a lease.
            number, subject = number % 2, "a"
        instance = self.instances[number]
        counters = tuple((limits, subject) for limits in self.sets)
        for _ in range(times):
            decision = instance.table.take(counters, cost)
            if decision is not None:
                AHEAD_DECISIONS[0] += instance.table.leases[counters].ahead is not None
                self._note(decision, counters, cost, instance.table.leases[counters].at_us)
                continue
            sent_ns = instance.clock_ns()
            request = instance.table.request(counters, cost, sent_ns)
            charge = Charge(counters, cost, request)
            if request is None:
                decision = self.store.charge(charge)
                instance.table.answered(counters)
                self._note(decision, counters, cost, self.now_us)
                continue
            self.requests.append((instance, charge, request, sent_ns))
            if answered:
                self._process(len(self.requests) - 1)
                self._answer(len(self.replies) - 1)

    @rule(number=st.integers(0, 3), subject=st.sampled_from("ab"))
    def renew(self, number: int, subject: str) -> None:
        instance = self.instances[number]
        wanted, instance.table.renewals = instance.table.renewals, []
        for counters in wanted:
            sent_ns = instance.clock_ns()
            request = instance.table.renewal(counters, sent_ns)
            if request is not None:
                self.requests.append((instance, Charge(counters, 0, request), request, sent_ns))

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 1000))
    def process(self, which: int) -> None:
        """The store decides a charge that was on its way."""
        self._process(which % len(self.requests))

    def _process_at_once(self, subject: str, cost: int) -> None:
        counters = tuple((limits, subject) for limits in self.sets)
        self._note(self.store.charge(Charge(counters, cost)), counters, cost, self.now_us)

    def _process(self, place: int) -> None:
        instance, charge, request, sent_ns = self.requests.pop(place)
        decision = self.store.charge(charge)
        self._note(decision, charge.counters, charge.cost, self.now_us)
        self.replies.append((instance, charge, request, sent_ns, decision))

    @precondition(lambda self: self.replies)
    @rule(which=st.integers(0, 1000), twice=st.booleans())
    def answer(self, which: int, twice: bool) -> None:
        """An answer arrives, perhaps to come once more."""
        place = which % len(self.replies)
        if twice:
            self.replies.append(self.replies[place])
        self._answer(place)

    def _answer(self, place: int) -> None:
        instance, charge, request, sent_ns, decision = self.replies.pop(place)
        instance.table.accept(charge.counters, request, decision, sent_ns, "session")

    def lose(self, lose_requests: bool, lose_returns: bool) -> None:
        """A connection is lost: what was on its way is."""
        self.replies.clear()
        if lose_requests:
            self.requests.clear()
        if lose_returns:
            self.returns.clear()

    @rule(number=st.integers(0, 3))
    def sweep(self, number: int) -> None:
        table = self.instances[number].table
        table.sweep(100)
        self.returns += table.returns
        table.returns = []

    @precondition(lambda self: self.returns)
    @rule(which=st.integers(0, 1000))
    def give_back(self, which: int) -> None:
        self.store.give_back(self.returns.pop(which % len(self.returns)))

    def die(self, number: int, drift: int) -> None:
        """An instance is killed and started again: its leases are lost."""
        self.instances[number] = _Instance(self, drift)

    def drop(self, number: int) -> None:
        """An instance gives up all leases, as on a drain or when a policy changed."""
        self.instances[number].table.drop()

    def reset(self, subject: str, number: int) -> None:
        """Units leased before a reset count for the time before it. The other instances drop theirs later, or not at all."""
        counters = [(limits, subject) for limits in self.sets]
        self.instances[number].table.forget(counters)
        self.store.reset(counters)
        self.resets[subject] += 1
        self.reset_us[subject] = self.now_us

    @rule(what=st.integers(0, 24), number=st.integers(0, 3), amount=AMOUNTS, burst=AMOUNTS, drift=st.sampled_from(DRIFTS))
    def happen(self, what: int, number: int, amount: int, burst: int, drift: int) -> None:
        """What is rare: most often nothing."""
        if what == 0:
            self.change(amount, burst)
        elif what == 1:
            self.lose(lose_requests=number > 1, lose_returns=number % 2 == 0)
        elif what == 2:
            self.die(number, drift)
        elif what == 3:
            self.drop(number)
        elif what == 4:
            self.reset("ab"[burst % 2], number)

    def _note(self, decision: Decision, counters: Any, cost: int, charged_us: int) -> None:
        if not decision.allowed or not cost:
            return
        for limits, subject in counters:
            if charged_us <= self.reset_us.get(subject, -1) and self.now_us != charged_us:
                continue
            period = f"{subject}{self.resets[subject]}"
            self.admitted.append(Admission(limits.name, period, cost, True, False, self.now_us, self.now_us))
            self.claimed.append(Admission(limits.name, period, cost, True, False, decision.at_us, decision.at_us))
            assert charged_us <= decision.at_us <= self.now_us

    def _promised(self, name: str, _: str) -> LimitSet:
        """The widest limits of a name that held at any time; the only ones in runs that change none."""
        amount, burst = self.most[name]
        algorithm = self.algorithm if name == "rule" else self.tier
        assert algorithm is not None
        if algorithm is QuotaAlgorithm.QUOTA:
            # Without an anchor, the periods of these quotas are windows.
            return LimitSet(name, Algorithm.FIXED_WINDOW, [Limit.parse(f"{amount}/{PERIODS[each]}") for each in self.windows])
        return self._set(name, algorithm, amount, burst)

    def teardown(self) -> None:
        """Never more than promised: by the true moments, and by those that the answers claim."""
        if not hasattr(self, "admitted"):
            return
        LEASED_DECISIONS[self.algorithm] += sum(instance.table.decisions for instance in self.instances)
        for admissions in (self.admitted, self.claimed):
            for report in prove(admissions, self._promised):
                assert report.excess_units == 0, report


@pytest.mark.parametrize(("algorithm", "tier"), [*((each, None) for each in LEASED), (LEASED[0], QuotaAlgorithm.QUOTA)])
def test_never_more_than_the_limit(algorithm: Algorithm, tier: AnyAlgorithm | None) -> None:
    LEASED_DECISIONS.clear()
    machine = type("Machine", (LeaseMachine,), {"algorithm": algorithm, "tier_algorithm": tier})
    run_state_machine_as_test(machine, settings=settings(max_examples=EXAMPLES, stateful_step_count=STEPS))
    assert LEASED_DECISIONS[algorithm] > 0


def test_never_more_than_a_sliding_limit_whose_units_are_leased_before_they_come_free() -> None:
    AHEAD_DECISIONS[0] = 0
    machine = type("Machine", (LeaseMachine,), {"algorithm": Algorithm.SLIDING_WINDOW, "reached": True})
    run_state_machine_as_test(machine, settings=settings(max_examples=EXAMPLES, stateful_step_count=STEPS))
    assert AHEAD_DECISIONS[0] > 0


def test_units_that_are_used_before_they_are_free_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ahead, "free", lambda self, at_us: self.amount - self.current)
    machine = type("Machine", (LeaseMachine,), {"algorithm": Algorithm.SLIDING_WINDOW, "reached": True})()
    machine.begin(amount=30, windows=["minute"], burst=1, tier=None, drifts=[1_000_000] * 4)
    for _ in range(40):
        machine.wait(200_000)
        machine.check(number=0, cost=1, times=1, subject="a", answered=True)
    with pytest.raises(AssertionError, match="held="):
        machine.teardown()


def test_a_lease_that_lives_too_long_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = LeaseTable._lease_of

    def too_long(self: LeaseTable, *arguments: Any) -> Any:
        lease = kept(self, *arguments)
        lease.expires_ns += 4_000_000_000
        return lease

    monkeypatch.setattr(LeaseTable, "_lease_of", too_long)
    machine = type("Machine", (LeaseMachine,), {"algorithm": Algorithm.FIXED_WINDOW})()
    machine.begin(amount=100, windows=["second"], burst=1, tier=None, drifts=[1_000_000] * 4)
    machine.check(number=0, cost=1, times=40, subject="a", answered=True)
    assert machine.instances[0].table.units > 1
    machine.wait(1_000_000)
    machine.check(number=1, cost=1, times=100, subject="a", answered=True)
    machine.check(number=0, cost=1, times=1, subject="a", answered=True)
    with pytest.raises(AssertionError, match="held=101"):
        machine.teardown()
