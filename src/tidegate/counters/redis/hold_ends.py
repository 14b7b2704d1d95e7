"""How many holds on Redis are open, without a call to Redis: by the seconds at which they expire.

An instance knows the holds that it opened, and when those expire that it settled or renewed. One that opens a hold counts it, one
that settles it in time takes it off again, maybe another one: the sum over all instances is exact, the number of one may be
negative. Holds that were open when an instance or worker ended are not counted any more.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from tidegate.timestamps import US_PER_S, now_us


class HoldEnds:
    """Counts open holds, and those that expired unsettled. At most one entry for each second of the longest time to live.

    Args:
        clock: µs since the epoch; differs from that of Redis by little.
    """

    def __init__(self, clock: Callable[[], int] = now_us) -> None:
        self._clock = clock
        self._by_second: dict[int, int] = {}
        self._seconds: list[int] = []
        self._open = 0
        self._expired = 0

    @property
    def open(self) -> int:
        """Holds opened here less those that were settled here in time, of those that have not expired."""
        self._drop_due()
        return self._open

    @property
    def expired(self) -> int:
        """Holds opened here less those that were settled here in time, of those whose time is over."""
        self._drop_due()
        return self._expired

    def note(self, ends_us: int, by: int) -> None:
        """Count a hold.

        Args:
            ends_us: when it expires, µs since the epoch.
            by: 1 where it was opened, -1 where it was settled in time.
        """
        second = -(-ends_us // US_PER_S)
        if second in self._by_second:
            # Where it is due already, it is dropped with the others of its second.
            self._by_second[second] += by
            self._open += by
            return
        self._drop_due()
        if second * US_PER_S <= self._clock():
            self._expired += by
            return
        heapq.heappush(self._seconds, second)
        self._by_second[second] = by
        self._open += by

    def _drop_due(self) -> None:
        now = self._clock()
        while self._seconds and self._seconds[0] * US_PER_S <= now:
            ended = self._by_second.pop(heapq.heappop(self._seconds))
            self._open -= ended
            self._expired += ended
