"""Checks that are not decided but recorded: a cost that is known only after the request, and hits that a gateway takes back.

A forced charge is charged whatever the limits say, and a refund gives back at most what counts now. Limits of requests in
progress are left out: nothing is in progress any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tidegate.counters import ChargeOutcome, Counters, CounterStore
from tidegate.counters.adjustments import adjusting
from tidegate.decision import Decision
from tidegate.errors import BadRequest, StoreUnavailable, TidegateError
from tidegate.gate.charging import ChargeResult, CheckPlan
from tidegate.policy.limits import ConcurrencyAlgorithm

CHARGE: Final = 1
REFUND: Final = -1
OUTCOME: Final = 2
"""The hits are the HTTP status of the response: a failure where a rule that counts failures says so; one unit elsewhere."""
_STATUSES: Final = range(100, 600)


async def adjust(store: CounterStore, plans: Sequence[tuple[CheckPlan | TidegateError, int]]) -> list[ChargeResult]:
    """Adjust the counters of plans, each on its own, in order.

    Args:
        plans: pairs of the plan of a check, or its error, and `CHARGE`, `REFUND` or `OUTCOME`; the check's cost is what is
            adjusted, or the status.

    Returns:
        For each what became of it; a decision is always allowed.
    """
    results = []
    for plan, sign in plans:
        if isinstance(plan, TidegateError):
            results.append(ChargeResult(plan))
            continue
        try:
            if sign == OUTCOME:
                outcomes = [await _record_outcome(store, charge.counters, charge.cost) for charge in plan.charges]
            else:
                outcomes = [await _adjust_counters(store, charge.counters, sign * charge.cost) for charge in plan.charges]
        except BadRequest as error:  # a store that is not one of Tidegate's
            results.append(ChargeResult(error))
            continue
        if plan.answer is None:
            results.append(ChargeResult(outcomes[0], outcomes[1:]))
        else:
            results.append(ChargeResult(plan.answer, outcomes))
    return results


async def _record_outcome(store: CounterStore, counters: Counters, status: int) -> ChargeOutcome:
    if status not in _STATUSES:
        raise BadRequest(
            f"hits {status} are not an HTTP status from 100 to 599: send hits_addend '%RESPONSE_CODE%'", field="hits"
        )
    failed = tuple(each for each in counters if each[0].failures is not None and status in each[0].failures.statuses)
    others = tuple(each for each in counters if each[0].failures is None)
    decided = await _adjust_counters(store, failed, 1)
    if not others:
        return decided
    charged = await _adjust_counters(store, others, 1)
    return decided if failed and isinstance(charged, Decision) else charged


async def _adjust_counters(store: CounterStore, counters: Counters, units: int) -> ChargeOutcome:
    counted = tuple(each for each in counters if each[0].algorithm is not ConcurrencyAlgorithm.CONCURRENT)
    if not counted:
        return Decision(True)
    try:
        return await adjusting(store).adjust(counted, units)
    except StoreUnavailable as error:
        return error
