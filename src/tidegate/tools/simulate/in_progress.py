"""Requests in progress at a moment of the log: each takes a slot from its start to its end, as a hold of live traffic does."""

from __future__ import annotations

import heapq
from typing import Final

from tidegate.counters import Counters
from tidegate.counters.holds import HoldHandle
from tidegate.counters.memory import MemoryCounters
from tidegate.policy.limits import IN_PROGRESS, MAX_AMOUNT

_BEYOND_END_US: Final = 1
"""Holds are settled at the end of their requests, before they would expire."""


class RequestsInProgress:
    """Takes and frees slots in the log's own time. There are at most as many as the counters may have subjects.

    Args:
        counters: whose clock is the log's.

    Attributes:
        ended_early: requests whose slots were freed before their end, because there were too many at once.
    """

    def __init__(self, counters: MemoryCounters) -> None:
        self.ended_early = 0
        self._counters = counters
        counters.max_holds = MAX_AMOUNT
        self._ends: list[tuple[int, int, HoldHandle]] = []
        self._opened = 0

    def end_until(self, at_us: int) -> None:
        """Free the slots of all requests that have ended. To be called before the clock is moved to this time."""
        while self._ends and self._ends[0][0] <= at_us:
            self._end_first()

    def admit(self, counters: Counters, cost: int, now_us: int, ends_us: int) -> bool:
        """Decide a request that takes slots; whether it is allowed.

        Args:
            counters: all that it is charged to.
            cost: units.
            now_us: the time of the counters' clock.
            ends_us: when it ends.
        """
        if self._counters.open_holds >= self._counters.max_subjects:
            self._end_first()
            self.ended_early += 1
        ends_us = max(ends_us, now_us)
        decision, hold = self._counters.open_hold_now(counters, cost, ends_us - now_us + _BEYOND_END_US)
        if hold is not None:
            self._opened += 1
            heapq.heappush(self._ends, (ends_us, self._opened, hold))
        return decision.allowed

    def has_free_slots(self, counters: Counters) -> bool:
        """Whether a request with these counters would be allowed by its limits of requests in progress."""
        slots = tuple(each for each in counters if each[0].algorithm in IN_PROGRESS)
        return self._counters.charge_all(slots, 1).allowed

    def _end_first(self) -> None:
        _, _, hold = heapq.heappop(self._ends)
        self._counters.settle_hold_now(hold, hold.cost)


def takes_slots(counters: Counters) -> bool:
    """Whether one of the counters limits requests in progress."""
    return any(limits.algorithm in IN_PROGRESS for limits, _ in counters)
