"""What a check is charged to where its tier or its rule has quotas."""

from __future__ import annotations

from tidegate.catalog.cache_level import Caller
from tidegate.counters import Counters
from tidegate.decision import Check
from tidegate.errors import clip
from tidegate.gate.subjects import attributes_subject, ip_needed
from tidegate.gate.usage import own_limits
from tidegate.policy.limits import LimitSet
from tidegate.policy.matching import CompiledRule, subject_of
from tidegate.policy.rules import Subject


def counters_with_quotas(check: Check, caller: Caller, rule: CompiledRule | None, ip: str | None) -> Counters:
    """The counters of a check: the rule's limits and quotas, then the tier's limits and quotas.

    Args:
        rule: that answers; None where none matches.
        ip: the client of the check's address; None if it is not known.

    Returns:
        Pairs of limits and subject, all of which must pass; none where nothing limits the check.

    Raises:
        BadRequest: naming the attribute or the address that is missing.
    """
    tier = caller.tier
    charged: list[tuple[LimitSet, str]] = []
    quotas = caller.quotas
    subject = caller.subject
    needed = tier.limits is not None or (quotas is not None and not caller.quota_subject)
    if rule is not None and not needed:
        needed = rule.subject is Subject.API_KEY or (rule.subject is Subject.CUSTOMER and not caller.customer_subject)
    if not subject and needed:
        if ip is None:
            raise ip_needed(check, "a check without an API key is counted by ip")
        subject = f"i:{ip}"
    counted = subject
    if rule is not None:
        if rule.subject is Subject.ATTRIBUTES:
            counted = attributes_subject(check, caller, rule, ip)
        elif rule.subject is not Subject.API_KEY:
            found = subject_of(rule.subject, subject, ip, tier.tier.name, caller.customer_subject)
            if found is None:
                raise ip_needed(check, f"the rule {clip(rule.rule.name)} counts by ip")
            counted = found
        if rule.limited:
            charged.append((rule.limits_of(counted, check.attributes), counted))
        if rule.quotas is not None:
            own = (caller.quota_subject or counted) if rule.subject is Subject.API_KEY else counted
            charged.append((rule.quotas.of(caller.anchor), own))
        if rule.slots is not None:
            charged.append((rule.slots, counted))
    if tier.limits is not None:
        charged.append((tier.limits, subject))
    if quotas is not None:
        charged.append((quotas, caller.quota_subject or subject))
    return tuple(charged)


def own_quotas(caller: Caller) -> Counters:
    """The counters of all quotas that count a caller with an API key: its tier's, and those of rules that count by key."""
    sets = [] if caller.quotas is None else [caller.quotas]
    sets += [rule.quotas.of(caller.anchor) for rule in caller.tier.rules if rule.quotas and rule.subject is Subject.API_KEY]
    return tuple((limits, caller.quota_subject) for limits in sets)


def key_counters(caller: Caller) -> Counters:
    """All counters that count a caller's API key alone, through its rotations; what counts its customer is left out."""
    has_customer = bool(caller.customer_subject)
    found = [(limits, caller.subject) for limits in own_limits(caller.tier, has_customer=has_customer)]
    if not has_customer:
        found += own_quotas(caller)
        by_customer = [rule for rule in caller.tier.rules if rule.quotas and rule.subject is Subject.CUSTOMER]
        found += [(rule.quotas.of(caller.anchor), caller.subject) for rule in by_customer if rule.quotas]
    return tuple(found)
