"""What changes of the catalog touched, as caches are told of it, and which answers they may still serve.

Where this is written down and read: `change_log`.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

TIER: Final = "tier"
KEY: Final = "key"
ANONYMOUS: Final = "anonymous"
CALLER_TOKEN: Final = "caller_token"
ALL: Final = "all"
"""More than `MAX_TOUCHED` things, or things that are not known."""
NONE: Final = "none"
"""Nothing that a check reads, such as an operator's token."""

MAX_READ: Final = 10_000
"""At most so many rows are read, the latest ones; and so many things are remembered."""

Item: TypeAlias = tuple[str, str]
"""What was touched: TIER and its name, KEY or CALLER_TOKEN and its digest, or one of the others with an empty name."""


class Changes(msgspec.Struct, frozen=True):
    """What happened to a catalog since some version.

    Args:
        version: of the catalog now.
        floor: what was touched up to this version is not known; the version asked about, where the log is whole.
        items: what was touched above it, each with the version of its last change, in order of version.
        versions: that the catalog had from the floor on, ascending. A number between them that is none of these was given by a
            primary that is lost.
    """

    version: int
    floor: int
    items: tuple[tuple[int, Item], ...] = ()
    versions: tuple[int, ...] = ()
