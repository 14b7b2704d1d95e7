"""The catalog of tiers, rules and API keys: the read path of checks.

`Catalog` is the port. `sql` implements it in SQLite and PostgreSQL, `shared` adds a cache in Redis that all instances share,
`cached` caches in the memory of one process, `in_memory` contains a single policy. Records are complete and immutable. A catalog
that does not answer raises `CatalogUnavailable`. Any number of tasks of one event loop may call it concurrently.
"""

from __future__ import annotations

from typing import Protocol

from tidegate.catalog.changes import Changes
from tidegate.policy.attributes import CallerPolicy
from tidegate.policy.customers import Customer
from tidegate.policy.model import ApiKey, Tier


class Catalog(Protocol):
    """The port of the catalog. Every lookup returns the catalog version that the value was read at, and the value.

    `min_version` is the lowest version that a value may be read at. An older cache entry or replica is skipped; the primary
    database answers in any case, because it may itself have been replaced by an older one.
    """

    async def api_key(self, sha256: str, min_version: int = 0) -> tuple[int, ApiKey | None]:
        """Look up an API key.

        Args:
            sha256: lower-case hex digest of the key.

        Returns:
            The version, and the key, also if it is revoked or expired; None if it is unknown.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...

    async def tier(self, name: str, min_version: int = 0) -> tuple[int, Tier | None]:
        """Look up a tier with all its rules.

        Returns:
            The version, and the tier; None if it is unknown.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...

    async def caller_policy(self, min_version: int = 0) -> tuple[int, CallerPolicy]:
        """Look up what the policy says of callers without an API key, and of attributes.

        Returns:
            The version, and the caller policy.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...

    async def customer(self, name: str, min_version: int = 0) -> tuple[int, Customer | None]:
        """Look up a customer, without its metadata.

        Returns:
            The version, and the customer; None if it is unknown.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...

    async def customer_name(self, digest: str, min_version: int = 0) -> tuple[int, str]:
        """Look up whom an attribute value belongs to.

        Args:
            digest: of the value, see `value_digest`.

        Returns:
            The version, and the name of the customer; empty if the value belongs to nobody.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...

    async def tier_names(self) -> list[str]:
        """The names of all tiers, sorted.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...

    async def changes(self, since: int) -> Changes:
        """What changed after a version.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...

    async def version(self) -> int:
        """The current version, 0 or more; every change of the catalog changes it.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...

    async def ping(self) -> None:
        """Check that the catalog answers.

        Raises:
            CatalogUnavailable: if it does not.
        """
        ...

    async def close(self) -> None:
        """Release all resources; the catalog is not used afterwards."""
        ...
