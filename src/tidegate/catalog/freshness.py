"""Which cached answers may still be served: the last change of each item, in bounded memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from tidegate.catalog.changes import ALL, MAX_READ, Changes, Item


class FreshnessTracker:
    """Which version of the catalog a cached answer must have seen to be served.

    Args:
        max_items: things remembered, 1 or more; beyond it the oldest are forgotten and the floor rises to them.
    """

    def __init__(self, max_items: int = MAX_READ) -> None:
        self.version = 0
        self.floor = 0
        self._max_items = max_items
        # Not a dict: finding its first entry takes longer the more entries were removed from its front.
        self._at: OrderedDict[Item, int] = OrderedDict()

    def min_version(self, kind: str, name: str = "") -> int:
        """The version of the last change of something.

        Args:
            kind: TIER, KEY or ANONYMOUS.
            name: of the tier, or digest of the key.
        """
        return max(self._at.get((kind, name), 0), self.floor)

    def note(self, changes: Changes) -> None:
        """Take in what happened."""
        if changes.version < self.version or changes.floor > self.version:
            self._at.clear()
            self.floor = changes.floor
        self.version = changes.version
        self.remember(changes.items)

    def remember(self, items: Iterable[tuple[int, Item]]) -> None:
        """Take in some of what happened, whatever else did."""
        for at, item in items:
            if item[0] == ALL:
                self.floor = max(self.floor, at)
                continue
            # The latest last; a change that was made here may be known before an earlier one is read of.
            self._at[item] = max(at, self._at.pop(item, 0))
        while len(self._at) > self._max_items:
            _, oldest_at = self._at.popitem(last=False)
            self.floor = max(self.floor, oldest_at)
