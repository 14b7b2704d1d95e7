"""Several checks of one request: charged all, or, where one of them is denied, none.

`CounterStore` decides each charge on its own. So they are looked at first (cost 0), and charged if all fit. In memory nothing
comes between the look and the charge. On Redis another instance may: then the request is denied although some of its checks were
charged; a limit is never exceeded.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tidegate.counters import Charge, ChargeOutcome, CounterStore
from tidegate.decision import CallerIdentity, Decision
from tidegate.errors import TidegateError


class CheckPlan(msgspec.Struct, frozen=True, gc=False):
    """What one check comes to before anything is charged.

    Args:
        answer: where nothing has to be counted to answer it, else None.
        charges: first the one that decides, where there is no answer yet; then one for each shadow rule.
        cost: units of the check.
        key_id: id of the caller's API key; empty without one.
        caller: who the check is from; None where neither an API key nor a customer is known.
        held: whether its cost is reserved by a hold, whose settlement charges it.
    """

    answer: Decision | None
    charges: Sequence[Charge]
    cost: int = 1
    key_id: str = ""
    caller: CallerIdentity | None = None
    held: bool = False

    @property
    def decides(self) -> bool:
        """Whether its first charge decides it."""
        return self.answer is None

    def shadow_outcomes(self, charged: Sequence[ChargeOutcome]) -> Sequence[ChargeOutcome]:
        """Those of its charges' outcomes that belong to shadow rules."""
        return charged[1:] if self.answer is None else charged


class ChargeResult(msgspec.Struct, frozen=True, gc=False):
    """What became of one plan.

    Args:
        outcome: the answer, or why there is none.
        shadow_outcomes: what its shadow rules would have decided; empty if they were not charged.
        charged: whether its charges were put to the store.
    """

    outcome: ChargeOutcome | TidegateError
    shadow_outcomes: Sequence[ChargeOutcome] = ()
    charged: bool = True


async def charge_independently(counters: CounterStore, plans: Sequence[CheckPlan | TidegateError]) -> list[ChargeResult]:
    """Decide plans each on its own, in order, with one call to the store.

    Args:
        plans: any number of them; an error is its own outcome.

    Returns:
        For each what became of it.
    """
    charges = [charge for plan in plans if isinstance(plan, CheckPlan) for charge in plan.charges]
    charged = await counters.charge(charges) if charges else ()
    settled: list[ChargeResult] = []
    at = 0
    for plan in plans:
        if isinstance(plan, TidegateError):
            settled.append(ChargeResult(plan))
            continue
        own = charged[at : at + len(plan.charges)]
        at += len(plan.charges)
        settled.append(ChargeResult(own[0], own[1:]) if plan.answer is None else ChargeResult(plan.answer, own))
    return settled


async def charge_all_or_none(counters: CounterStore, plans: Sequence[CheckPlan | TidegateError]) -> list[ChargeResult]:
    """Charge plans all, or none of them where one is denied. Costs a second call to the store where several have to be counted.

    Args:
        plans: any number of them; an error denies them all.

    Returns:
        For each what became of it: where the request is denied, those that would have passed by themselves tell what is left to
        them, and were not charged.
    """
    deciding = [number for number, plan in enumerate(plans) if isinstance(plan, CheckPlan) and plan.decides]
    refused = any(isinstance(plan, TidegateError) or (plan.answer is not None and not plan.answer.allowed) for plan in plans)
    if not refused and len(deciding) < 2:
        return await charge_independently(counters, plans)
    looked = await counters.charge([_look(plans[number]) for number in deciding]) if deciding else ()
    seen = dict(zip(deciding, looked, strict=True))
    short = [number for number, outcome in seen.items() if not _fits(outcome, plans[number])]
    if not refused and not short:
        return await charge_independently(counters, plans)
    # Those that do not fit are charged: a denial charges nothing, and has the time to retry.
    asked = dict(zip(short, await charge_independently(counters, [plans[number] for number in short]), strict=True))
    if not refused and all(_passed(settled) for settled in asked.values()):
        # A window has ended since the look.
        rest = [number for number in range(len(plans)) if number not in asked]
        asked |= dict(zip(rest, await charge_independently(counters, [plans[number] for number in rest]), strict=True))
    return [asked[number] if number in asked else _uncharged(plan, seen.get(number)) for number, plan in enumerate(plans)]


def _look(plan: CheckPlan | TidegateError) -> Charge:
    assert isinstance(plan, CheckPlan)
    return Charge(plan.charges[0].counters, 0)


def _fits(outcome: ChargeOutcome, plan: CheckPlan | TidegateError) -> bool:
    assert isinstance(plan, CheckPlan)
    return isinstance(outcome, Decision) and (outcome.remaining is None or outcome.remaining >= plan.charges[0].cost)


def _passed(settled: ChargeResult) -> bool:
    return isinstance(settled.outcome, Decision) and settled.outcome.allowed


def _uncharged(plan: CheckPlan | TidegateError, seen: ChargeOutcome | None) -> ChargeResult:
    if isinstance(plan, TidegateError):
        return ChargeResult(plan)
    outcome = plan.answer if plan.answer is not None else seen
    assert outcome is not None
    return ChargeResult(outcome, charged=False)
