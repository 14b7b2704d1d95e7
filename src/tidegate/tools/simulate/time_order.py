"""Sorting of requests by time in bounded memory: logs are written when requests end, and by several processes."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Final

from tidegate.timestamps import US_PER_S
from tidegate.tools.simulate.log_formats import Request

_LONG: Final = 256


class TimeOrder:
    """Buffers requests until no earlier ones are expected.

    Requests are collected in buckets of one second, and a bucket is sorted when it is released: this costs less than a heap, and
    the order does not depend on the order of the log.

    Args:
        emit: called for each request, in time order.
        window_s: how much earlier than the latest request a request may be, s.
        max_buffered: maximum number of buffered requests; beyond it, those of the earliest second are released early. A long path
            counts as one request for each 256 characters, so that long paths do not fill the memory.
    """

    def __init__(self, emit: Callable[[Request], None], window_s: int, max_buffered: int) -> None:
        self.out_of_order = 0
        self.late = 0
        self._emit = emit
        self._window_s = window_s
        self._max_buffered = max_buffered
        self._buckets: dict[int, list[Request]] = {}
        self._extra: dict[int, int] = {}
        self._seconds: list[int] = []
        self._latest_us = -1
        self._latest_s = -1
        self._next_s = 0
        self._buffered = 0

    def add(self, request: Request) -> None:
        """Add a request. One earlier than those already released is released immediately and counted as late."""
        at_us = request[0]
        second = at_us // US_PER_S
        if at_us < self._latest_us:
            self.out_of_order += 1
            if second < self._next_s:
                self.late += 1
                self._emit(request)
                return
        else:
            self._latest_us = at_us
        bucket = self._buckets.get(second)
        if bucket is None:
            self._buckets[second] = [request]
            heapq.heappush(self._seconds, second)
        else:
            bucket.append(request)
        self._buffered += 1
        if len(request[3]) > _LONG:
            extra = len(request[3]) // _LONG
            self._buffered += extra
            self._extra[second] = self._extra.get(second, 0) + extra
        if second > self._latest_s:
            self._latest_s = second
            self._release(second - self._window_s)
        if self._buffered > self._max_buffered:
            self._release(self._seconds[0] + 1)

    def finish(self) -> None:
        """Release all buffered requests."""
        self._release(self._latest_s + 1)

    def _release(self, before_s: int) -> None:
        """Release all buckets before a second; requests that arrive for them later are late."""
        self._next_s = max(self._next_s, before_s)
        while self._seconds and self._seconds[0] < before_s:
            second = heapq.heappop(self._seconds)
            bucket = self._buckets.pop(second)
            self._buffered -= len(bucket) + self._extra.pop(second, 0)
            bucket.sort()
            for request in bucket:
                self._emit(request)
