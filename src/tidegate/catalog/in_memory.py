"""A catalog in memory that holds one policy."""

from __future__ import annotations

from tidegate.policy.model import ApiKey, Policy, Tier


class PolicyCatalog:
    """A catalog in memory that holds one policy: for the library, for tests and for simulations.

    Args:
        policy: what it holds first.
    """

    def __init__(self, policy: Policy) -> None:
        self._version = 0
        self.replace(policy)

    def replace(self, policy: Policy) -> None:
        """Hold another policy.

        Args:
            policy: the whole new policy.
        """
        self._tiers = {tier.name: tier for tier in policy.tiers}
        self._keys = {api_key.sha256: api_key for api_key in policy.api_keys}
        self._anonymous = policy.anonymous_tier
        self._version += 1

    async def api_key(self, sha256: str, least: int = 0) -> ApiKey | None:  # noqa: ARG002 - it is always as it is now
        """See `Catalog.api_key`."""
        return self._keys.get(sha256)

    async def tier(self, name: str, least: int = 0) -> Tier | None:  # noqa: ARG002 - it is always as it is now
        """See `Catalog.tier`."""
        return self._tiers.get(name)

    async def tier_names(self) -> list[str]:
        """See `Catalog.tier_names`."""
        return sorted(self._tiers)

    async def anonymous_tier(self, least: int = 0) -> str | None:  # noqa: ARG002 - it is always as it is now
        """See `Catalog.anonymous_tier`."""
        return self._anonymous

    async def version(self) -> int:
        """See `Catalog.version`."""
        return self._version

    async def ping(self) -> None:
        """See `Catalog.ping`: memory always answers."""

    async def close(self) -> None:
        """See `Catalog.close`: there is nothing to give back."""
