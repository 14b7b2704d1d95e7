"""What customers have left, and what counts them: for the control plane, which knows a customer's name alone."""

from __future__ import annotations

from tidegate.catalog.cache_level import Caller
from tidegate.catalog.cached import CachedCatalog
from tidegate.errors import BadRequest, clip
from tidegate.gate.usage import Counter
from tidegate.policy.limits import LimitSet
from tidegate.policy.rules import Subject
from tidegate.timestamps import now_us


async def customer_caller(catalog: CachedCatalog, name: str, tier: str | None) -> Caller:
    """A caller of a customer without an API key.

    Args:
        catalog: who may do what.
        name: of the customer.
        tier: of the caller; None for the customer's own.

    Raises:
        BadRequest: if there is no such customer or tier, or the customer has no tier and none was given.
        CatalogUnavailable: if the catalog fails and no usable entry is cached.
    """
    customer = await catalog.customers.find(name)
    if customer is None:
        raise no_such_customer(name)
    tier_name = tier or customer.record.tier
    if not tier_name:
        raise BadRequest(f"the customer {clip(name)} has no tier of its own: send tier, that of its callers", field="tier")
    found = await catalog.tier_caller(tier_name)
    if found is None:
        raise BadRequest(f"there is no tier {clip(tier_name)}: see 'tidegate tiers'", field="tier")
    own = customer.tier(found.cached_tier).unkeyed
    own.end_overrides(now_us())
    return own


async def customer_counters(catalog: CachedCatalog, name: str) -> list[Counter]:
    """All that counts a customer over its keys and attribute values: quotas, and rules with `subject = "customer"`.

    Rules of every tier, because keys may have a tier of their own, and the customer may have had another one. Rules for
    descriptors count the customer together with values that only checks have: those are left out.

    Raises:
        BadRequest: if there is no such customer.
        CatalogUnavailable: if the catalog fails and no usable entry is cached.
    """
    customer = await catalog.customers.find(name)
    if customer is None:
        raise no_such_customer(name)
    # Quotas of all tiers have one counter, and so have those of rules of one name.
    found: dict[str, LimitSet] = {}
    for tier_name in await catalog.tier_names():
        tier = await catalog.tier(tier_name)
        if tier is None:
            continue
        if tier.quotas is not None:
            made = tier.quotas.of(customer.anchor)
            found.setdefault(made.name, made)
        for rule in tier.rules:
            if rule.subject is Subject.CUSTOMER:
                for limits, _ in rule.counters(customer.subject, customer.anchor):
                    found.setdefault(limits.name, limits)
            elif rule.subject is Subject.API_KEY and rule.quotas is not None:
                made = rule.quotas.of(customer.anchor)
                found.setdefault(made.name, made)
    return [(limits, customer.subject) for limits in found.values()]


def no_such_customer(name: str) -> BadRequest:
    """The error for an unknown customer."""
    return BadRequest(f"there is no customer {clip(name)}: see 'tidegate customers list'", field="customer")
