"""The descriptor tree of envoyproxy/ratelimit: finds the limit of a descriptor.

For each key, an exact value takes precedence, then the first matching wildcard in file order, then the key without a value.
A wildcard is a value with any number of `*`, each matching any run of characters, including none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from tidegate.policy.globs import Glob, GlobIndex
from tidegate.policy.limits import Limit

MAX_SIMILAR_WILDCARDS: Final = 1000
"""Maximum number of wildcards of one key with the same prefix and suffix: all of them are tried for a value with both."""


class FileLimit(msgspec.Struct, frozen=True):
    """A `rate_limit` block with the settings of its descriptor.

    Args:
        limit: amount and window; an amount of 0 denies every request; None if unlimited.
        path: its keys and values, for messages and counter names: `key=value/key`.
        name: name by which other limits replace it; empty if none.
        replaces: names of the limits that do not apply if this one does.
        shadow: whether it is in shadow mode: counted, never denied.
        quota: whether it is in quota mode: counted, never denied, and what is over is reported to Envoy.
    """

    limit: Limit | None
    path: str
    name: str = ""
    replaces: tuple[str, ...] = ()
    shadow: bool = False
    quota: bool = False

    @property
    def passes(self) -> bool:
        """Whether requests above it pass."""
        return self.shadow or self.quota


class Node:
    """One level of descriptors.

    Attributes:
        rate_limit: the limit of descriptors that end here; None if there is none.
        shared: the wildcard whose values share one counter; empty if each value has its own.
    """

    __slots__ = ("_any_value", "_exact", "_wildcards", "rate_limit", "shared")

    def __init__(self) -> None:
        self.rate_limit: FileLimit | None = None
        self.shared = ""
        # Includes wildcards: a value may be literally equal to one.
        self._exact: dict[tuple[str, str], Node] = {}
        self._wildcards: dict[str, GlobIndex[tuple[int, Callable[[str], bool], Node]]] = {}
        self._any_value: dict[str, Node] = {}

    def add(self, key: str, value: str, node: Node) -> int | None:
        """Add a child for a key and a value; an empty value matches any.

        Returns:
            The number of wildcards of this key with the same prefix and suffix, 0 for a value without wildcard; None if there is
            already a child for this key and value.
        """
        if not value:
            return None if self._any_value.setdefault(key, node) is not node else 0
        if self._exact.setdefault((key, value), node) is not node:
            return None
        if "*" not in value:
            return 0
        glob = Glob(value)
        index = self._wildcards.setdefault(key, GlobIndex())
        return index.add(glob.beginning, glob.end, (len(self._exact), glob.matches, node))

    def child(self, key: str, value: str) -> Node | None:
        """The child that matches one entry; None if there is none."""
        found = self._exact.get((key, value))
        if found is not None:
            return found
        wildcards = self._wildcards.get(key)
        if wildcards is not None:
            first = -1
            for place, matches, node in wildcards.candidates(value):
                if (first < 0 or place < first) and matches(value):
                    first, found = place, node
            if found is not None:
                return found
        return self._any_value.get(key)

    def children(self) -> Iterator[Node]:
        """All direct children."""
        yield from self._exact.values()
        yield from self._any_value.values()
