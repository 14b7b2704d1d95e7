"""What was used from leases since the store last decided a check of the same subject.

Leased units are charged in the store. If the store is lost, so is that charge, and an instance that used its leases and then its
share of a limit would admit more than one without leases. So what is used from leases uses up the share (`fallback`) as well,
until the store decides a check again. No I/O; one event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from tidegate.counters import Counters
from tidegate.policy.limits import LimitSet


class LeaseUsage:
    """Units used from leases that have ended, by counters.

    Args:
        max_entries: 1 or more; beyond, the oldest are dropped.
    """

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._units: OrderedDict[Counters, tuple[int, int]] = OrderedDict()

    def __len__(self) -> int:
        """Number of counters."""
        return len(self._units)

    def add(self, counters: Counters, units: int, until_ns: int) -> None:
        """Note what was used from a lease that ends.

        Args:
            units: 1 or more.
            until_ns: from when none of them counts any more, monotonic.
        """
        before = self._units.pop(counters, None)
        if before is not None:
            units, until_ns = units + before[0], max(until_ns, before[1])
        elif len(self._units) >= self._max_entries:
            self._units.popitem(last=False)
        self._units[counters] = (units, until_ns)

    def units(self, counters: Counters, now_ns: int) -> int:
        """Units that still count."""
        units, until_ns = self._units.get(counters, (0, 0))
        return units if now_ns < until_ns else 0

    def forget(self, counters: Counters) -> None:
        """The store decided a check of these counters, or the units are counted elsewhere."""
        self._units.pop(counters, None)

    def forget_where(self, of: Callable[[LimitSet, str], bool]) -> None:
        """Counters were reset.

        Args:
            of: selects them.
        """
        for counters in [each for each in self._units if any(of(*counter) for counter in each)]:
            del self._units[counters]

    def sweep(self, now_ns: int, steps: int) -> None:
        """Drop what counts no more.

        Args:
            steps: most entries to examine; the next call examines others.
        """
        for _ in range(min(steps, len(self._units))):
            counters, (_, until_ns) = next(iter(self._units.items()))
            if until_ns <= now_ns:
                del self._units[counters]
            else:
                self._units.move_to_end(counters)
