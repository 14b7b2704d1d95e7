"""Work of one request in time slices, so that no request blocks the event loop for long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

SLICE_NS: Final = 2_000_000
"""How long one request may work without a pause, ns. A single item that takes longer is finished first."""


class TimeSlice:
    """The time that a request has worked since its last pause.

    Args:
        slice_ns: how long it may, ns.
        clock_ns: monotonic clock, ns.
    """

    __slots__ = ("_clock_ns", "_end_ns", "_slice_ns")

    def __init__(self, slice_ns: int | None = None, clock_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._slice_ns = SLICE_NS if slice_ns is None else slice_ns
        self._clock_ns = clock_ns
        self._end_ns = clock_ns() + self._slice_ns

    @property
    def over(self) -> bool:
        """Whether it is time for `pause`. Costs 0.1 µs."""
        return self._clock_ns() >= self._end_ns

    async def pause(self) -> None:
        """Let other tasks run, and begin a new slice."""
        await asyncio.sleep(0)
        self._end_ns = self._clock_ns() + self._slice_ns
