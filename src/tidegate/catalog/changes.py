"""Changes of the catalog, as caches receive them. `sql.change_log` writes and reads them in the database."""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

TIER: Final = "tier"
KEY: Final = "key"
ANONYMOUS: Final = "anonymous"
CUSTOMER: Final = "customer"
CUSTOMER_VALUE: Final = "customer_value"
"""An attribute value that belongs, or belonged, to a customer."""
CALLER_TOKEN: Final = "caller_token"
BLOCK: Final = "block"
"""Blocks, whichever: readers find what changed by its version."""
ALL: Final = "all"
"""More than `MAX_TOUCHED` items, or unknown items."""
NONE: Final = "none"
"""Nothing that a check reads, such as an operator's token."""

MAX_READ: Final = 10_000
"""Maximum number of rows read, the latest ones, and of items and versions stored in memory."""

Item: TypeAlias = tuple[str, str]
"""A touched item: TIER or CUSTOMER and its name, KEY, CUSTOMER_VALUE or CALLER_TOKEN and its digest, or one of the others and an
empty name."""


class Changes(msgspec.Struct, frozen=True):
    """Changes of a catalog since a version.

    Args:
        floor: touched items up to this version are unknown; equals the requested version if the log is complete.
        items: items touched after it, each with the version of its last change, ordered by version.
        versions: versions of the catalog from the floor on, ascending. Another version in this range was assigned by a primary
            that was lost.
    """

    version: int
    floor: int
    items: tuple[tuple[int, Item], ...] = ()
    versions: tuple[int, ...] = ()
