"""Descriptors as envoyproxy/ratelimit nests them: which limit is for a descriptor.

Of one key, a value that is written out goes first, then the first wildcard in the file's order that matches, then the key alone.
A wildcard is a value with `*` anywhere, any number of times, each for any run of characters; empty values match `*` too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from tidegate.policy.globs import Glob, GlobIndex
from tidegate.policy.limits import Limit

MAX_SIMILAR_WILDCARDS: Final = 1000
"""Most wildcards of one key whose literal beginning and end are the same: each of them is tried for a value that has both."""


class FileLimit(msgspec.Struct, frozen=True):
    """A `rate_limit` block, with what its descriptor says of it.

    Args:
        limit: amount and window; an amount of 0 refuses everything; None where it is unlimited.
        path: keys and values that lead to it, for people and for counters: `key=value/key`.
        name: under which others may replace it; empty where none.
        replaces: names of the limits that are left out where this one applies.
        shadow: whether it only watches.
    """

    limit: Limit | None
    path: str
    name: str = ""
    replaces: tuple[str, ...] = ()
    shadow: bool = False


class Node:
    """One level of descriptors.

    Attributes:
        rate_limit: what holds for descriptors that end here; None where nothing does.
        shared: text of the wildcard that counts all its values as one; empty where each value counts for itself.
    """

    __slots__ = ("_any_value", "_exact", "_wildcards", "rate_limit", "shared")

    def __init__(self) -> None:
        self.rate_limit: FileLimit | None = None
        self.shared = ""
        # Wildcards are in here too: a value may be the very text of one.
        self._exact: dict[tuple[str, str], Node] = {}
        self._wildcards: dict[str, GlobIndex[tuple[int, Callable[[str], bool], Node]]] = {}
        self._any_value: dict[str, Node] = {}

    def add(self, key: str, value: str, node: Node) -> int | None:
        """Put a node below this one.

        Args:
            key: of the descriptor.
            value: of the descriptor; empty for any.
            node: the node.

        Returns:
            How many wildcards of this key have its literal beginning and end, 0 for a node without one; None where the place is
            taken.
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
        """The node for one entry.

        Args:
            key: of the entry.
            value: of the entry.

        Returns:
            The node, or None where nothing matches.
        """
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
        """All nodes right below this one."""
        yield from self._exact.values()
        yield from self._any_value.values()
