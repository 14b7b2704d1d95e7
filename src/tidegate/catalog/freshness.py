"""Which cached answers may still be served: the last change of each item, in bounded memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from tidegate.catalog.changes import ALL, MAX_READ, Changes, Item


class FreshnessTracker:
    """The minimum catalog version of a cached answer that may be served.

    Args:
        max_items: number of items stored, 1 or more; beyond it the oldest are dropped and `floor` rises to their version.
    """

    def __init__(self, max_items: int = MAX_READ) -> None:
        self.version = 0
        self.floor = 0
        self._max_items = max_items
        # Not a dict: finding its first entry takes longer the more entries were removed from its front.
        self._at: OrderedDict[Item, int] = OrderedDict()

    def min_version(self, kind: str, name: str = "") -> int:
        """The version of the last change of an item, or the floor.

        Args:
            kind: TIER, KEY or ANONYMOUS.
            name: name of the tier, or digest of the key.
        """
        return max(self._at.get((kind, name), 0), self.floor)

    def is_known(self, version: int, item: Item) -> bool:
        """Whether the last change of an item was at this version. A later one may be of a lost primary."""
        return self._at.get(item) == version

    def note(self, changes: Changes) -> None:
        """Add changes read from the catalog since `version`."""
        if changes.version < self.version or changes.floor > self.version:
            self._at.clear()
            self.floor = changes.floor
        self.version = changes.version
        self.remember(changes.items)

    def remember(self, items: Iterable[tuple[int, Item]]) -> None:
        """Add some changes, each with its version, without the claim that there were no others."""
        for at, item in items:
            if item[0] == ALL:
                self.floor = max(self.floor, at)
                continue
            # The latest last; a change made in this process may be added before an earlier one is read.
            self._at[item] = max(at, self._at.pop(item, 0))
        while len(self._at) > self._max_items:
            _, oldest_at = self._at.popitem(last=False)
            self.floor = max(self.floor, oldest_at)
