"""Where policy lives. `Catalog` is the port that checks read; `sql` keeps it in SQLite or PostgreSQL, `policy_file` in a file,
`cached` in memory in front of either.

What a catalog returns is whole, immutable records. When it cannot answer it raises `CatalogUnavailable`. Any number of tasks
of one event loop may ask at once.
"""

from __future__ import annotations

from typing import Protocol

from tidegate.policy import ApiKey, Tier


class Catalog(Protocol):
    """The port of the catalog: what a check needs to know."""

    async def api_key(self, sha256: str) -> ApiKey | None:
        """Look an API key up.

        Args:
            sha256: lower-case hex digest of the key.

        Returns:
            The key, revoked and expired ones too; None where it is unknown.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...

    async def tier(self, name: str) -> Tier | None:
        """Look a tier up, with all its rules.

        Args:
            name: the tier's name.

        Returns:
            The tier, or None where it is unknown.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...

    async def tier_names(self) -> list[str]:
        """All tiers there are.

        Returns:
            Their names, sorted.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...

    async def anonymous_tier(self) -> str | None:
        """The tier of checks that bring no key.

        Returns:
            Its name, or None where such checks are refused.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...

    async def version(self) -> int:
        """A number that changes with every change of the catalog.

        Returns:
            The version, 0 or more.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...

    async def ping(self) -> None:
        """Find out whether the catalog answers.

        Raises:
            CatalogUnavailable: if it does not.
        """
        ...

    async def close(self) -> None:
        """Give back what the catalog holds; it is not used afterwards."""
        ...
