"""Counting the most frequent of any number of keys in bounded memory.

The algorithm is Space-Saving over its Stream-Summary (Metwally, Agrawal, El Abbadi: Efficient Computation of Frequent and Top-k
Elements in Data Streams, ICDT 2005): where the summary is full, a new key takes the place of one with the least count, and that
count with it, as its error.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

_K = TypeVar("_K", bound=Hashable)


class SpaceSaving(Generic[_K]):
    """Counts of at most `capacity` keys. Exact while no more keys came; of N additions in all, whatever their order:

    - every key that was added more than N / `capacity` times is there;
    - its guaranteed count is never above the truth, and at most N / `capacity` below it.

    No addition takes longer than another: keys of the same count hang together, so that the least count is always at hand. One
    event loop.

    Args:
        capacity: most keys, 1 or more; each costs about 300 bytes with its text.
    """

    __slots__ = ("_counts", "_errors", "_least", "_levels", "capacity")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._counts: dict[_K, int] = {}
        # Only of keys that took another's place.
        self._errors: dict[_K, int] = {}
        self._levels: dict[int, dict[_K, None]] = {}
        self._least = 0

    def __len__(self) -> int:
        """Keys held."""
        return len(self._counts)

    def add(self, key: _K) -> None:
        """Count a key once. Costs about 0.3 µs, and 0.6 µs where it takes another's place."""
        counts, levels = self._counts, self._levels
        count = counts.get(key)
        if count is None:
            if len(counts) < self.capacity:
                count, self._least = 0, 1
            else:
                count = self._least
                level = levels[count]
                # The last one, not the first: a dict is searched from its beginning over all that were taken out of it.
                replaced, _ = level.popitem()
                del counts[replaced]
                self._errors.pop(replaced, None)
                self._errors[key] = count
                if not level:
                    del levels[count]
                    self._least = count + 1
        else:
            level = levels[count]
            if len(level) == 1:
                del levels[count]
                if self._least == count:
                    self._least = count + 1
                if count + 1 not in levels:
                    # Alone before and after, as one that is blocked all the time is.
                    levels[count + 1] = level
                    counts[key] = count + 1
                    return
            else:
                del level[key]
        counts[key] = count = count + 1
        above = levels.get(count)
        if above is None:
            levels[count] = {key: None}
        else:
            above[key] = None

    @property
    def floor(self) -> int:
        """The highest count that a key without an entry may have, and the most by which a count of `top` may be too high; 0 while
        all counts are exact.
        """
        return self._least if self._errors else 0

    def top(self, limit: int) -> list[tuple[_K, int]]:
        """The most frequent keys.

        Returns:
            Keys and counts, highest counts first, equal counts in the order of their keys; a count is never too low.
        """
        return heapq.nsmallest(limit, self._counts.items(), key=lambda item: (-item[1], item[0]))

    def guaranteed(self) -> Iterator[tuple[_K, int]]:
        """How often each key was added at least; nothing may be added meanwhile.

        Yields:
            Key and count, 1 or more.
        """
        errors = self._errors
        for key, count in self._counts.items():
            yield key, count - errors.get(key, 0)
