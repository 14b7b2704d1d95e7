"""Thresholds of limits, and the charges that cross them.

A store that has a `CrossingWatch` reports what is left of each limit right after a charge, read in the same atomic step. So of
all instances exactly one finds each crossing: the one whose charge crossed it.

A crossing is found once for each time that the use of a limit rises over the threshold; sliding windows and buckets may cross it
again in the same window. Leased units count as used from the grant on, so a lease may cross a threshold before its units are
used; a lease never takes the last units, so 100 % is exact. A charge that several shards share is reported by each shard as it
charges, also if the charge is refunded because another shard denied it. What the fallback admits while the store is unavailable
is reported once it is added to the store. Units that a hold reserves count as used from the moment it opens, which reports what
they cross; its settlement reports what is crossed by units beyond them, or by all of them where the hold had expired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeAlias

import msgspec

from tidegate.policy.limits import Limit, LimitSet

_MAX_SETS: Final = 65_536

Marks: TypeAlias = tuple[tuple[tuple[int, int], ...], ...]
"""For each limit of a set its thresholds: percent, and units."""


class Crossing(msgspec.Struct, frozen=True, gc=False):
    """The use of a limit rose to a threshold.

    Args:
        limits: that the limit belongs to.
        percent: the threshold.
        used: units after the charge.
        at_us: when, by the store's clock, µs since the epoch.
    """

    limits: LimitSet
    limit: Limit
    subject: str
    percent: int
    used: int
    at_us: int


class CrossingWatch:
    """Finds crossings. Not thread-safe.

    Args:
        percents: returns the thresholds of a limit, percent; none where it is not watched.
        on_crossing: callback run for every crossing; must be fast and must not raise.
    """

    def __init__(self, percents: Callable[[LimitSet, Limit], Iterable[int]], on_crossing: Callable[[Crossing], None]) -> None:
        self._percents = percents
        self._on_crossing = on_crossing
        self._marks: dict[LimitSet, Marks] = {}

    def marks(self, limits: LimitSet) -> Marks:
        """The thresholds of a set; empty where none of its limits has any."""
        found = self._marks.get(limits)
        if found is None:
            if len(self._marks) >= _MAX_SETS:
                self._marks.clear()
            found = tuple(
                tuple((percent, -(-limit.capacity * percent // 100)) for percent in self._percents(limits, limit))
                for limit in limits.limits
            )
            if not any(found):
                found = ()
            self._marks[limits] = found
        return found

    def watches(self, counters: Iterable[tuple[LimitSet, str]]) -> bool:
        """Whether any of these counters has thresholds."""
        return any(self.marks(limits) for limits, _ in counters)

    def note(self, limits: LimitSet, subject: str, left: Sequence[int | None], charged: int, at_us: int) -> None:
        """Find the crossings of one counter.

        Args:
            left: for each limit what is left after the charge, below 0 above it; None where it was not charged.
            charged: units of the charge, including a lease.
            at_us: the store's clock.
        """
        marks = self.marks(limits)
        if not marks:
            return
        for limit, thresholds, remaining in zip(limits.limits, marks, left, strict=True):
            if remaining is None or not thresholds:
                continue
            used = limit.capacity - remaining
            for percent, units in thresholds:
                if used - charged < units <= used:
                    self._on_crossing(Crossing(limits, limit, subject, percent, used, at_us))

    def note_change(
        self, counters: Sequence[tuple[LimitSet, str]], before: Sequence[int | None], after: Sequence[int | None], at_us: int
    ) -> None:
        """Find the crossings of units that were charged whatever the limits said.

        Args:
            before: of all limits of the counters, in order, what was left before, below 0 above a limit; None where not charged.
            after: the same afterwards.
            at_us: the store's clock.
        """
        changes = iter(zip(before, after, strict=True))
        for limits, subject in counters:
            for limit, (old, new) in zip(limits.limits, changes, strict=False):
                if old is not None and new is not None and new < old:
                    left = [new if each is limit else None for each in limits.limits]
                    self.note(limits, subject, left, old - new, at_us)

    def note_all(self, counters: Sequence[tuple[LimitSet, str]], left: Sequence[int | None], charged: int, at_us: int) -> None:
        """As `note`, for all counters of a charge.

        Args:
            left: of all their limits, in order.
            charged: see `note`.
            at_us: see `note`.
        """
        start = 0
        for limits, subject in counters:
            end = start + len(limits.limits)
            self.note(limits, subject, left[start:end], charged, at_us)
            start = end
