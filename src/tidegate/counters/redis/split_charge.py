"""Charging counters of several shards, where a rule counts by another subject than its tier's own limits.

All counters are peeked at together, then all are charged together; those that the peek found too full are charged first, and
where they refuse, nothing else is charged. So something has to be given back only where another check took the last units between
the two steps. In between another check may be refused that would have passed; more than a limit is never admitted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from tidegate.algorithms import DECIDE, State
from tidegate.counters import Charge, LateAnswer
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import IN_PROGRESS, LimitSet

Counter: TypeAlias = tuple[LimitSet, str]
ChargeOne: TypeAlias = Callable[[Charge], Awaitable[Decision]]
GiveBack: TypeAlias = Callable[[Sequence[tuple[LimitSet, str, Sequence[State]]]], Awaitable[object]]


async def charge_split(charge: Charge, charge_one: ChargeOne, give_back: GiveBack) -> Decision:
    """Charge all counters or none.

    Args:
        charge_one: charges one counter; its answers may be late, and are waited for.
        give_back: adds states to counters.

    Returns:
        The decision of the whole.

    Raises:
        StoreUnavailable: if a shard does not answer; what others charged was given back.
    """

    async def all_of(counters: Sequence[Counter], cost: int) -> list[Decision]:
        outcomes = await asyncio.gather(
            *(_wait_for_late(charge_one, Charge((counter,), cost)) for counter in counters), return_exceptions=True
        )
        decisions = []
        for counter, outcome in zip(counters, outcomes, strict=True):
            if isinstance(outcome, Decision):
                decisions.append(outcome)
                # A soft limit that was reached was not charged, and limits of requests in progress never are.
                limits = counter[0]
                if outcome.allowed and cost and limits.algorithm not in IN_PROGRESS and not (limits.soft and outcome.overage):
                    charged.append((counter, outcome))
        failed = next((outcome for outcome in outcomes if isinstance(outcome, BaseException)), None)
        if failed is not None:
            raise failed
        return decisions

    charged: list[tuple[Counter, Decision]] = []
    whole = charge.counters[0][0]
    try:
        peeks = await all_of(charge.counters, 0)
        if not charge.cost:
            return _for_whole_check(min(peeks, key=_remaining), whole, peeks)
        full = [counter for counter, peek in zip(charge.counters, peeks, strict=True) if _remaining(peek) < charge.cost]
        decided: list[Decision] = []
        for counters in (full, [counter for counter in charge.counters if counter not in full]):
            decided += await all_of(counters, charge.cost)
            denials = [each for each in decided if not each.allowed]
            if denials:
                await _give_back(charged, charge.cost, give_back)
                return _for_whole_check(max(denials, key=_retry_after), whole, ())
    except (StoreUnavailable, asyncio.CancelledError):
        await _give_back(charged, charge.cost, give_back)
        raise
    return _for_whole_check(min(decided, key=_remaining), whole, decided)


async def await_late_answer(late: LateAnswer) -> Decision:
    """The decision of a charge whose deadline passed, when its answer comes.

    Args:
        late: as the store raised it.

    Raises:
        StoreUnavailable: if the answer cannot come any more, or is none.
    """
    decode = late.decode
    while True:
        try:
            answer = await late.answer
        except LateAnswer as later:
            late = later
        else:
            if isinstance(answer, Decision):
                return answer
            if decode is None:
                raise StoreUnavailable("a late reply does not belong to a charge", reason="garbage")
            return decode(answer)


async def _wait_for_late(charge_one: ChargeOne, charge: Charge) -> Decision:
    try:
        return await charge_one(charge)
    except LateAnswer as late:
        return await await_late_answer(late)


async def _give_back(charged: list[tuple[Counter, Decision]], cost: int, give_back: GiveBack) -> None:
    """A shard that is gone with the charge keeps it: less is admitted than might be, never more."""
    if charged:
        await give_back(
            [
                (
                    limits,
                    subject,
                    [_negative(DECIDE[limits.algorithm](limit, None, decision.at_us, cost)[0]) for limit in limits.limits],
                )
                for (limits, subject), decision in charged
            ]
        )


def _remaining(decision: Decision) -> int:
    return decision.remaining or 0


def _retry_after(decision: Decision) -> float:
    return float("inf") if decision.retry_after_us is None else decision.retry_after_us


def _negative(state: State) -> State:
    """What gives a lone charge back: its state with the units below 0."""
    assert state is not None
    if isinstance(state[1], tuple):
        return (-state[0], state[1], tuple(-cost for cost in state[2]))
    if len(state) == 4:
        return (-state[0], *state[1:])
    return (state[0], *(-units for units in state[1:]))


def _for_whole_check(decision: Decision, limits: LimitSet, all_of: Sequence[Decision]) -> Decision:
    """A decision of one counter of a check, as the whole check's; over by as much as the one that is over the most."""
    return Decision(
        decision.allowed,
        decision.binding,
        decision.remaining,
        decision.reset_after_us,
        decision.retry_after_us,
        decision.at_us,
        limits,
        overage=max((each.overage for each in all_of), default=0),
    )
