"""What can have counted a subject, in any tier: for resets."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tidegate.catalog.cached import CachedCatalog
from tidegate.errors import BadRequest, clip
from tidegate.gate.usage import Counter, own_limits
from tidegate.ip_addresses import client_of
from tidegate.policy.attributes import OnMissing, parse_subject
from tidegate.policy.descriptors import entries_subject
from tidegate.policy.limits import LimitSet
from tidegate.policy.matching import CompiledRule, CompiledTier
from tidegate.policy.periods import DEFAULT_ANCHOR
from tidegate.policy.rules import Subject


async def counters_by_attributes(catalog: CachedCatalog, subject: str) -> list[Counter]:
    """What rules of all tiers count by exactly these attributes.

    Args:
        catalog: who may do what.
        subject: such as `user=42`, or `org=acme&user=42`.

    Raises:
        BadRequest: if the subject cannot be read.
        CatalogUnavailable: if the catalog fails and no usable entry is cached.
    """
    entries = parse_subject(subject)
    text = entries_subject(sorted(entries.items()), prefix="a:")

    def counting(tier: CompiledTier) -> list[LimitSet]:
        rules = [each for each in tier.attribute_rules if {*each.parts} == {*entries}]
        return [limits for rule in rules for limits, _ in rule.counters(text, attributes=entries)]

    return [(limits, text) for limits in await _sets_of(catalog, counting)]


async def counters_by_tier(catalog: CachedCatalog, tier: str) -> list[Counter]:
    """What the rules of a tier count by tier.

    Raises:
        BadRequest: if there is no such tier.
        CatalogUnavailable: if the catalog fails and no usable entry is cached.
    """
    compiled = await catalog.tier(tier)
    if compiled is None:
        raise BadRequest(f"there is no tier {clip(tier)}: see 'tidegate tiers'", field="tier")
    return [(limits, f"t:{tier}") for limits in _sets(rule for rule in compiled.rules if rule.subject is Subject.TIER)]


async def counters_by_ip(catalog: CachedCatalog, ip: str) -> list[Counter]:
    """All that can count an address: rules by ip of every tier, and what counts callers without a key or an attribute.

    Raises:
        BadRequest: if the ip is no address.
        CatalogUnavailable: if the catalog fails and no usable entry is cached.
    """
    client = f"i:{client_of(ip)}"
    policy = await catalog.caller_policy()
    anonymous = await catalog.anonymous()
    # Callers without a key may be of any tier where their attributes name it.
    own = "" if anonymous is None else anonymous.tier.tier.name

    def counting(tier: CompiledTier) -> list[LimitSet]:
        by_ip = _sets(rule for rule in tier.rules if rule.subject is Subject.IP)
        by_ip += _sets(rule for rule in tier.attribute_rules if rule.rule.on_missing is OnMissing.IP)
        if not policy.tier_from and tier.tier.name != own:
            return by_ip
        by_ip += own_limits(tier)
        own_kinds = (Subject.API_KEY, Subject.CUSTOMER)
        by_ip += [rule.quotas.of(DEFAULT_ANCHOR) for rule in tier.rules if rule.quotas and rule.subject in own_kinds]
        return by_ip if tier.quotas is None else [*by_ip, tier.quotas.of(DEFAULT_ANCHOR)]

    return [(limits, client) for limits in await _sets_of(catalog, counting)]


async def _sets_of(catalog: CachedCatalog, counting: Callable[[CompiledTier], list[LimitSet]]) -> list[LimitSet]:
    """Limits of every tier."""
    found: list[LimitSet] = []
    for name in await catalog.tier_names():
        compiled = await catalog.tier(name)
        if compiled is not None:
            found.extend(counting(compiled))
    return found


def _sets(rules: Iterable[CompiledRule]) -> list[LimitSet]:
    """The limits and quotas of rules, for the default anchor: those of other anchors have the same counters."""
    return [limits for rule in rules for limits, _ in rule.counters("")]
