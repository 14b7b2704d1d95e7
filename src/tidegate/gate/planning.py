"""What a check is charged to: from the caller and the rule that answers it to counters, without waiting for anything."""

from __future__ import annotations

from tidegate.catalog.cache_level import Caller
from tidegate.counters import Charge, Counters, KeptCounters
from tidegate.decision import MAX_COST, Check, Decision, Observation, clip
from tidegate.errors import BadRequest, TidegateError
from tidegate.gate.access import uncounted
from tidegate.gate.charging import CheckPlan
from tidegate.gate.quotas import counters_with_quotas
from tidegate.gate.subjects import DescriptorCheck, attributes_subject, descriptor_subject, ip_needed
from tidegate.policy.attributes import MAX_VALUE, long_value
from tidegate.policy.limits import LimitSet
from tidegate.policy.matching import CompiledRule, CompiledTier, subject_of
from tidegate.policy.model import Mode, Subject


def exempt_plan(check: Check | DescriptorCheck, caller: Caller) -> CheckPlan:
    """The plan of a check that nothing limits."""
    return CheckPlan(Decision(True, unlimited_tier=caller.tier.tier.name), (), check.cost, caller.key_id, caller.identity)


def rule_of(check: Check, tier: CompiledTier) -> CompiledRule | None:
    """The rule that answers a check."""
    attributes = check.attributes
    if not attributes:
        return tier.match(check.method, check.path)
    for name in tier.attribute_names:
        # Not every door bounds values: some are there for other programs.
        if name in attributes and len(attributes[name]) > MAX_VALUE:
            raise long_value(name, attributes[name])
    return tier.match(check.method, check.path, attributes)


def counters_of(check: Check, caller: Caller, rule: CompiledRule | None, ip: str | None) -> tuple[tuple[LimitSet, str], ...]:
    """What a check is charged to: the counter of the rule that answers it, and that of the tier's own limits."""
    tier = caller.tier
    if tier.has_actions and rule is not None and rule.action is not None:
        return uncounted(rule)
    if tier.has_quotas:
        return counters_with_quotas(check, caller, rule, ip)
    tier_limits = tier.limits
    if rule is not None and rule.subject is Subject.ATTRIBUTES:
        counted = attributes_subject(check, caller, rule, ip)
        own = () if tier_limits is None else ((tier_limits, _caller_subject(check, caller, ip)),)
        limits = rule.limits if rule.overrides is None else rule.overrides.of(counted, check.attributes, rule.limits)
        return ((limits, counted), *own)
    if rule is None and tier_limits is None:
        return ()
    if rule is not None and tier_limits is None and caller.customer_subject and rule.subject is Subject.CUSTOMER:
        # No address is needed.
        return ((rule.limits, caller.customer_subject),)
    subject = caller.subject or _caller_subject(check, caller, ip)
    if rule is None:
        assert tier_limits is not None
        return ((tier_limits, subject),)
    counted = subject
    if rule.subject is not Subject.API_KEY:
        found = subject_of(rule.subject, subject, ip, tier.tier.name, caller.customer_subject)
        if found is None:
            raise ip_needed(check, f"the rule {clip(rule.rule.name)} counts by ip")
        counted = found
    charged: Counters = ((rule.limits, counted),) if tier_limits is None else ((rule.limits, counted), (tier_limits, subject))
    if caller.subject and rule.subject is not Subject.IP:
        charged = KeptCounters(charged)
        caller.last_counters = rule, charged
    return charged


def _caller_subject(check: Check, caller: Caller, ip: str | None) -> str:
    if caller.subject:
        return caller.subject
    if ip is None:
        raise ip_needed(check, "a check without an API key is counted by ip")
    return f"i:{ip}"


def observation_of(
    decision: Decision,
    counters: tuple[tuple[LimitSet, str], ...],
    latency_ns: int,
    shadow_denied: tuple[str, ...],
    cost: int,
    key_id: str,
) -> Observation:
    """What telemetry reads of a decision by these counters, the rule's first; by none where nothing limits the check."""
    customer = decision.customer or ""
    if not counters:
        return Observation(decision, None, latency_ns, shadow_denied, None, None, cost, key_id, customer)
    if decision.allowed:
        return Observation(decision, None, latency_ns, shadow_denied, counters[0][1], None, cost, key_id, customer)
    denied_by, subject = counters[0]
    # A decision names the rule that answered; the binding limit identifies the limit set that denied.
    for limits, counted in counters[1:]:
        if decision.binding in limits.limits:
            denied_by, subject = limits, counted
    return Observation(decision, None, latency_ns, shadow_denied, subject, denied_by, cost, key_id, customer)


def plan_of_descriptor(check: DescriptorCheck, caller: Caller | TidegateError, client: str | None) -> CheckPlan | None:
    """The limits that apply to a descriptor without a path; None if there are none."""
    if isinstance(caller, TidegateError):
        raise caller
    if not 0 <= check.cost <= MAX_COST:
        raise BadRequest(f"cost {clip(check.cost)} must be a whole number from 0 to {MAX_COST}", field="cost")
    entries = check.entries
    matched = caller.tier.match_entries(entries)
    answering = next((each.compiled for each in matched if each.compiled.rule.mode is not Mode.SHADOW), None)
    if answering is not None and answering.action is not None:
        uncounted(answering)
        return exempt_plan(check, caller)
    charges = [
        (
            each.compiled.rule.mode,
            Charge(each.compiled.counters(descriptor_subject(check, caller, each, client), caller.anchor, entries), check.cost),
        )
        for each in matched
    ]
    enforced = next((charge for mode, charge in charges if mode is not Mode.SHADOW), None)
    shadow_outcomes = [charge for mode, charge in charges if mode is Mode.SHADOW]
    if enforced is None and not shadow_outcomes:
        return None
    if enforced is None:
        return CheckPlan(
            Decision(True, unlimited_tier=caller.tier.tier.name), shadow_outcomes, check.cost, caller.key_id, caller.identity
        )
    return CheckPlan(None, [enforced, *shadow_outcomes], check.cost, caller.key_id, caller.identity)
