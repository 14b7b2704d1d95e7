"""A catalog in memory with one policy."""

from __future__ import annotations

import msgspec

from tidegate.catalog.changes import Changes
from tidegate.policy.attributes import CallerPolicy
from tidegate.policy.customers import Customer, value_digest
from tidegate.policy.model import ApiKey, Policy, Tier


class PolicyCatalog:
    """A catalog in memory with one policy: for the library, for tests and for simulations."""

    def __init__(self, policy: Policy) -> None:
        self._version = 0
        self.replace(policy)

    def replace(self, policy: Policy) -> None:
        """Replace the policy, which raises the version by 1."""
        self._tiers = {tier.name: tier for tier in policy.tiers}
        self._keys = {api_key.sha256: api_key for api_key in policy.api_keys}
        self._caller_policy = policy.caller_policy
        self._customers = {customer.name: msgspec.structs.replace(customer, metadata="") for customer in policy.customers}
        self._owners = {value_digest(*value): customer.name for customer in policy.customers for value in customer.values}
        self._version += 1

    async def api_key(self, sha256: str, min_version: int = 0) -> tuple[int, ApiKey | None]:  # noqa: ARG002 - always the latest
        """See `Catalog.api_key`."""
        return self._version, self._keys.get(sha256)

    async def tier(self, name: str, min_version: int = 0) -> tuple[int, Tier | None]:  # noqa: ARG002 - always the latest
        """See `Catalog.tier`."""
        return self._version, self._tiers.get(name)

    async def caller_policy(self, min_version: int = 0) -> tuple[int, CallerPolicy]:  # noqa: ARG002 - always the latest
        """See `Catalog.caller_policy`."""
        return self._version, self._caller_policy

    async def customer(self, name: str, min_version: int = 0) -> tuple[int, Customer | None]:  # noqa: ARG002 - always the latest
        """See `Catalog.customer`."""
        return self._version, self._customers.get(name)

    async def customer_name(self, digest: str, min_version: int = 0) -> tuple[int, str]:  # noqa: ARG002 - always the latest
        """See `Catalog.customer_name`."""
        return self._version, self._owners.get(digest, "")

    async def tier_names(self) -> list[str]:
        """See `Catalog.tier_names`."""
        return sorted(self._tiers)

    async def changes(self, since: int) -> Changes:  # noqa: ARG002 - no log is kept
        """See `Catalog.changes`; any other version counts as a change of everything."""
        return Changes(self._version, self._version, versions=(self._version,))

    async def version(self) -> int:
        """See `Catalog.version`."""
        return self._version

    async def ping(self) -> None:
        """See `Catalog.ping`; memory always answers."""

    async def close(self) -> None:
        """See `Catalog.close`; there is nothing to release."""
