"""Where policy lives. `Catalog` is the port that checks read; `sql` keeps it in SQLite or PostgreSQL, `policy_file` in a file,
`cached` in memory in front of either.

What a catalog returns is whole, immutable records. When it cannot answer it raises `CatalogUnavailable`. Any number of tasks
of one event loop may ask at once.
"""

from __future__ import annotations

from typing import Protocol

from tidegate.catalog.changes import Changes
from tidegate.policy.model import ApiKey, Tier


class Catalog(Protocol):
    """The port of the catalog: what a check needs to know."""

    async def api_key(self, sha256: str, least: int = 0) -> ApiKey | None:
        """Look an API key up.

        Args:
            sha256: lower-case hex digest of the key.
            least: version of the catalog that the answer must have seen, where the catalog has got so far.

        Returns:
            The key, revoked and expired ones too; None where it is unknown.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...

    async def tier(self, name: str, least: int = 0) -> Tier | None:
        """Look a tier up, with all its rules.

        Args:
            name: the tier's name.
            least: version of the catalog that the answer must have seen, where the catalog has got so far.

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

    async def anonymous_tier(self, least: int = 0) -> str | None:
        """The tier of checks that bring no key.

        Args:
            least: version of the catalog that the answer must have seen, where the catalog has got so far.

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


class VersionedCatalog(Catalog, Protocol):
    """A catalog that says of which version an answer is, and what changed since."""

    async def read_key(self, sha256: str, least: int = 0) -> tuple[int, ApiKey | None]:
        """`api_key`, with the version that the answer is of.

        Args:
            sha256: lower-case hex digest of the key.
            least: version of the catalog that the answer must have seen, where the catalog has got so far.

        Returns:
            The version, and the key.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...

    async def read_tier(self, name: str, least: int = 0) -> tuple[int, Tier | None]:
        """`tier`, with the version that the answer is of.

        Args:
            name: the tier's name.
            least: version of the catalog that the answer must have seen, where the catalog has got so far.

        Returns:
            The version, and the tier.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...

    async def read_anonymous(self, least: int = 0) -> tuple[int, str | None]:
        """`anonymous_tier`, with the version that the answer is of.

        Args:
            least: version of the catalog that the answer must have seen, where the catalog has got so far.

        Returns:
            The version, and the tier's name.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...

    async def changes(self, since: int) -> Changes:
        """What was touched since a version.

        Args:
            since: the version that was seen, 0 or more.

        Returns:
            What happened.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...
