"""What shadow rules count, and whom they would have denied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tidegate.catalog.cache_level import Caller
from tidegate.counters import Charge, ChargeOutcome
from tidegate.decision import Decision
from tidegate.gate.charging import CheckPlan
from tidegate.observation import ShadowDenial
from tidegate.policy.limits import LimitSet
from tidegate.policy.matching import CompiledRule
from tidegate.policy.rules import Subject


def shadow_counters(
    rule: CompiledRule, subject: str, caller: Caller, attributes: Mapping[str, str]
) -> tuple[tuple[LimitSet, str], ...]:
    """What a shadow rule charges: what it would charge if it was enforced.

    Args:
        subject: whom its limits count.
        caller: whose the check is; the quotas of a rule by key count the customer.
    """
    if rule.quotas is None or rule.subject is not Subject.API_KEY or not caller.customer_subject:
        return rule.counters(subject, caller.anchor, attributes)
    own = (rule.quotas.of(caller.anchor), caller.customer_subject)
    return ((rule.limits_of(subject, attributes), subject), own) if rule.limited else (own,)


def shadow_denials(plan: CheckPlan, charged: Sequence[ChargeOutcome]) -> tuple[ShadowDenial, ...]:
    """What the shadow rules of a check would have denied. One without an answer counts as one that would not have denied.

    Args:
        plan: of the check.
        charged: outcomes of its charges, in order.
    """
    found = []
    first = 1 if plan.decides else 0
    for charge, outcome in zip(plan.charges[first:], charged[first:], strict=False):
        if isinstance(outcome, Decision) and not outcome.allowed:
            found.append(_denial(charge, outcome))
    return tuple(found)


def _denial(charge: Charge, outcome: Decision) -> ShadowDenial:
    limits, subject = charge.counters[0]
    for other, counted in charge.counters[1:]:
        if outcome.binding in other.limits:
            subject = counted
    return ShadowDenial(limits.tier or "", limits.rule or "", subject, outcome.at_us)
