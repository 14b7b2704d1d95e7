"""Several checks of one request: all of them are charged, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Clock
from tidegate.counters import Charge, ChargeOutcome
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Decision
from tidegate.errors import BadRequest, TidegateError
from tidegate.gate.charging import CheckPlan, charge_all_or_none, charge_independently
from tidegate.policy.limits import Algorithm, Limit, LimitSet


class Interrupted(MemoryCounters):
    """Counters where something happens between the look and the charge, as it may on a store that others use too."""

    immediate = False

    def __init__(self, clock: Clock, between: Callable[[], None]) -> None:
        super().__init__(clock=clock)
        self._between = between
        self.calls = 0

    async def charge(self, charges: Sequence[Charge]) -> Sequence[ChargeOutcome]:
        self.calls += 1
        if self.calls == 2:
            self._between()
        return await super().charge(charges)


def limits(name: str, amount: int, algorithm: Algorithm = Algorithm.FIXED_WINDOW) -> LimitSet:
    return LimitSet(name, algorithm, [Limit.parse(f"{amount}/minute")], rule=name)


def plan(counted: LimitSet, cost: int = 1, subject: str = "s") -> CheckPlan:
    return CheckPlan(None, [Charge(((counted, subject),), cost)])


async def left(counters: MemoryCounters, counted: LimitSet) -> int | None:
    outcome = (await counters.charge([Charge(((counted, "s"),), 0)]))[0]
    assert isinstance(outcome, Decision)
    return outcome.remaining


async def test_none_is_charged_where_one_is_denied(clock: Clock) -> None:
    counters = MemoryCounters(clock=clock)
    wide, tight, shadow = limits("wide", 5), limits("tight", 1), limits("shadow", 3)
    shadow_outcomes = CheckPlan(Decision(True, unlimited_tier="t"), [Charge(((shadow, "s"),), 1)])
    first = await charge_all_or_none(counters, [plan(wide), plan(tight), shadow_outcomes])
    assert [each.charged for each in first] == [True, True, True]
    second = await charge_all_or_none(counters, [plan(wide), plan(tight), shadow_outcomes])
    allowed = [each.outcome.allowed for each in second if isinstance(each.outcome, Decision)]
    assert (allowed, [each.charged for each in second]) == ([True, False, True], [False, True, False])
    denied = second[1].outcome
    assert isinstance(denied, Decision)
    assert denied.retry_after is not None
    assert denied.retry_after > 0
    assert [await left(counters, each) for each in (wide, tight, shadow)] == [4, 0, 2]
    for refusal in (BadRequest("no"), CheckPlan(Decision(False), ())):
        third = await charge_all_or_none(counters, [plan(wide), refusal])
        assert third[0].charged is False
    assert await left(counters, wide) == 4


async def test_a_window_that_ends_between_look_and_charge(clock: Clock) -> None:
    counters = Interrupted(clock, lambda: clock.advance(60))
    wide, tight = limits("wide", 5), limits("tight", 1)
    await MemoryCounters.charge(counters, [Charge(((tight, "s"),), 1)])
    settled = await charge_all_or_none(counters, [plan(wide), plan(tight)])
    assert all(isinstance(each.outcome, Decision) and each.outcome.allowed and each.charged for each in settled)
    assert [await left(counters, each) for each in (wide, tight)] == [4, 0]


async def test_another_who_charges_between_look_and_charge_never_lets_too_much_through(clock: Clock) -> None:
    wide, tight = limits("wide", 5), limits("tight", 1)

    def other() -> None:
        counters.charge_one(tight, "s", 1)

    counters = Interrupted(clock, other)
    settled = await charge_all_or_none(counters, [plan(wide), plan(tight)])
    assert [isinstance(each.outcome, Decision) and each.outcome.allowed for each in settled] == [True, False]


async def test_one_check_costs_one_call(clock: Clock) -> None:
    counters = Interrupted(clock, lambda: None)
    await charge_all_or_none(counters, [plan(limits("one", 5))])
    assert counters.calls == 1
    assert await charge_all_or_none(counters, []) == []
    assert await charge_independently(counters, []) == []


@given(
    st.lists(st.tuples(st.sampled_from(list(Algorithm)), st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=4),
    st.integers(1, 6),
)
async def test_a_request_leaves_a_trace_in_all_limits_or_in_none(asked: list[tuple[Algorithm, int, int]], requests: int) -> None:
    counters = MemoryCounters(clock=Clock())
    sets = [limits(f"l{number}", amount, algorithm) for number, (algorithm, amount, _) in enumerate(asked)]
    plans: list[CheckPlan | TidegateError] = [plan(each, cost) for each, (_, _, cost) in zip(sets, asked, strict=True)]
    for _ in range(requests):
        before = [await left(counters, each) for each in sets]
        settled = await charge_all_or_none(counters, plans)
        after = [await left(counters, each) for each in sets]
        passes = all(isinstance(each.outcome, Decision) and each.outcome.allowed for each in settled)
        costs = [cost if passes else 0 for _, _, cost in asked]
        assert [had - has for had, has in zip(before, after, strict=True) if had is not None and has is not None] == costs
