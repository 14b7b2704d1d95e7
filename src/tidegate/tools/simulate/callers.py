"""Who the requests of a log are from: API keys, customers and tiers of the policy, as live checks find them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from tidegate.catalog.cache_level import CachedCustomer, CachedTier, Caller
from tidegate.policy.key_format import hash_api_key, is_possible_key
from tidegate.policy.matching import CompiledTier
from tidegate.policy.model import KeyStatus, Policy, Tier

_MAX_REMEMBERED: Final = 50_000
_REMEMBERED_LENGTH: Final = 256


class PolicyCallers:
    """The callers of a policy. Overrides that end apply to requests before their end.

    Attributes:
        customer_attributes: names of attributes whose values may belong to a customer, in the order in which they decide.
        labels: names of API keys by subject, of those that were found.
    """

    def __init__(self, policy: Policy) -> None:
        self.tiers = {each.name: CachedTier(CompiledTier(_lasting(each))) for each in policy.tiers}
        self.customers = {each.name: CachedCustomer(each) for each in policy.customers}
        self.customer_attributes = policy.caller_policy.customer_attributes
        self.labels: dict[str, str] = {}
        self._owners = {
            (attribute, value): self.customers[each.name]
            for each in policy.customers
            for attribute, values in each.match
            for value in values
        }
        self._records = {key.sha256: key for key in policy.api_keys}
        self._records_by_id = {key.id: key for key in policy.api_keys}
        self._by_id: dict[str, Caller] = {}
        self._by_key: dict[str, Caller | None] = {}

    def of_key(self, api_key: str) -> Caller | None:
        """The caller of an API key; None if the policy does not contain it."""
        try:
            return self._by_key[api_key]
        except KeyError:
            pass
        record = self._records.get(hash_api_key(api_key)) if is_possible_key(api_key) else None
        found = None if record is None else self.of_id(record.id)
        if len(api_key) <= _REMEMBERED_LENGTH:
            if len(self._by_key) >= _MAX_REMEMBERED:
                self._by_key.clear()
            self._by_key[api_key] = found
        return found

    def of_id(self, key_id: str) -> Caller | None:
        """The caller of a key's id; None if the policy does not contain the key."""
        found = self._by_id.get(key_id)
        record = None if found is not None else self._records_by_id.get(key_id)
        if record is None:
            return found
        tier = self.tiers[record.tier]
        customer = self.customers.get(record.customer)
        found = self._by_id[key_id] = Caller(record, tier if customer is None else customer.tier(tier))
        self.labels[found.subject] = record.name
        return found

    def owner(self, attributes: Mapping[str, str]) -> CachedCustomer | None:
        """The customer that attributes belong to; None for none."""
        for name in self.customer_attributes:
            value = attributes.get(name)
            if value is not None and (found := self._owners.get((name, value))) is not None:
                return found
        return None

    def unkeyed(self, tier: str, customer: CachedCustomer | None) -> Caller:
        """The caller of a tier without an API key.

        Args:
            tier: name of a tier of the policy.
            customer: whose it is; None for nobody's.
        """
        found = self.tiers[tier]
        return (found if customer is None else customer.tier(found)).unkeyed


def is_refused(caller: Caller, now_us: int) -> bool:
    """Whether the API key of a caller is revoked, or has expired at a time (µs since the epoch)."""
    key = caller.api_key
    if key is None:
        return False
    return key.status is not KeyStatus.ACTIVE or (key.expires_at_us is not None and key.expires_at_us <= now_us)


def _lasting(tier: Tier) -> Tier:
    """A tier without the overrides for subjects that end: their end is compared with the clock of this machine."""
    return msgspec.structs.replace(tier, overrides=tuple(each for each in tier.overrides if each.until_us is None))
