"""Rows of the holds of counters in memory: numbers in arrays, because an object for each hold would take several times as much.

A row is about 100 bytes: 44 in the arrays, and an integer that three lists share: its moment and its row. That moment is when the
hold expires, or, once it has ended, when it is forgotten. The id of a hold is its row and 64 random bits.
"""

from __future__ import annotations

import heapq
import os
from array import array
from binascii import a2b_base64, b2a_base64
from typing import Any, Final

from tidegate.counters.handle_text import TO_STANDARD, TO_URL
from tidegate.policy.limits import LimitSet

FREE, OPEN, SETTLED, SETTLED_LATE, EXPIRED = range(5)
ROW_BITS: Final = 32
_ROW: Final = (1 << ROW_BITS) - 1
_SECRET: Final = (1 << 64) - 1
_DRAWN_AT_ONCE: Final = 512
MAX_STALE: Final = 64
"""Entries of ended holds that a heap may have beside as many as there are open ones."""


class HeldCounter:
    """A counter that holds were opened for. A reset puts another one in its place.

    Attributes:
        key: of the counter.
        open: how many of its holds are open.
        marks: heap of the moments at which its holds expire; those of ended holds stay for a while.
        reset: whether the counter was reset, so that it does not contain what these holds charged.
    """

    __slots__ = ("key", "limits", "marks", "open", "reset", "rows", "subject")

    def __init__(self, limits: LimitSet, subject: str, key: str) -> None:
        self.limits = limits
        self.subject = subject
        self.key = key
        self.open = self.rows = 0
        self.marks: list[int] = []
        self.reset = False


class HoldRows:
    """All holds that a store knows.

    Attributes:
        state: of each row.
        at_us: when its hold was opened, µs since the epoch.
        cost: units reserved; once it was settled, units charged.
        level: of the bucket of its only limit just after, in tokens; 0 for others.
        mark: its moment and its row.
        details: for rows with several counters or limits, for each counter the levels by window; None where nothing was charged.
    """

    def __init__(self) -> None:
        self.state = bytearray()
        self.at_us = array("q")
        self.cost = array("I")
        self.level = array("q")
        self.mark: list[int] = []
        self.counters: list[Any] = []
        self.details: dict[int, list[dict[str, int] | None]] = {}
        self._secret = array("Q")
        self._free: list[int] = []

    def add(self, at_us: int, ends_us: int, cost: int, counters: HeldCounter | tuple[HeldCounter, ...], level: int) -> int:
        """Add an open hold.

        Args:
            at_us: when it was opened.
            ends_us: when it expires.
            cost: units reserved.
            counters: one, or a tuple of several: a tuple of one would be more than half of a row.
            level: see the class.

        Returns:
            Its row.
        """
        secret = _DRAWN.pop() if _DRAWN else _draw()
        if self._free:
            row = self._free.pop()
            self._secret[row] = secret
            self.state[row] = OPEN
            self.at_us[row] = at_us
            self.cost[row] = cost
            self.level[row] = level
            self.mark[row] = ends_us << ROW_BITS | row
            self.counters[row] = counters
            return row
        row = len(self.mark)
        self._secret.append(secret)
        self.state.append(OPEN)
        self.at_us.append(at_us)
        self.cost.append(cost)
        self.level.append(level)
        self.mark.append(ends_us << ROW_BITS | row)
        self.counters.append(counters)
        return row

    def free(self, row: int) -> None:
        """Forget a hold."""
        self.state[row] = FREE
        self.counters[row] = None
        self.details.pop(row, None)
        self._free.append(row)

    def id_of(self, row: int) -> str:
        """The id of a hold: 16 characters."""
        raw = (row << 64 | self._secret[row]).to_bytes(12, "big")
        return b2a_base64(raw, newline=False).translate(TO_URL).decode()

    def find(self, hold: str) -> int | None:
        """The row of an id; None for one that is not known."""
        number = int.from_bytes(a2b_base64(hold.encode().translate(TO_STANDARD)), "big")
        row = number >> 64
        if row < len(self.mark) and self.state[row] and self._secret[row] == number & _SECRET:
            return row
        return None

    def counters_of(self, row: int) -> tuple[HeldCounter, ...]:
        """The counters of a row."""
        kept = self.counters[row]
        return (kept,) if type(kept) is HeldCounter else kept

    def moment(self, row: int) -> int:
        """When an open hold expires, or when an ended one is forgotten, µs since the epoch."""
        return self.mark[row] >> ROW_BITS

    def move(self, row: int, moment_us: int) -> int:
        """Set the moment of a row; returns its mark, for heaps."""
        mark = self.mark[row] = moment_us << ROW_BITS | row
        return mark

    def live_row(self, mark: int) -> int | None:
        """The row of a mark; None where its hold has ended or has another moment."""
        row = mark & _ROW
        return row if self.state[row] == OPEN and self.mark[row] == mark else None

    def ended_row(self, mark: int) -> int | None:
        """The row of a mark; None where its hold has another moment, at which it is forgotten."""
        row = mark & _ROW
        return row if self.state[row] > OPEN and self.mark[row] == mark else None

    def push(self, heap: list[int], mark: int, live: int) -> None:
        """Add a mark to a heap, and drop those of ended holds where they are many.

        Args:
            heap: of marks.
            mark: of a row.
            live: how many of its rows are open.
        """
        heapq.heappush(heap, mark)
        if len(heap) > 2 * live + MAX_STALE:
            self.drop_stale(heap)

    def drop_stale(self, heap: list[int]) -> None:
        """Drop the marks of ended holds."""
        heap[:] = {each for each in heap if self.live_row(each) is not None}
        heapq.heapify(heap)


def _draw() -> int:
    """64 random bits; many are drawn at once, because a system call costs more than all else here."""
    while True:
        try:
            return _DRAWN.pop()
        except IndexError:
            _DRAWN.frombytes(os.urandom(8 * _DRAWN_AT_ONCE))


_DRAWN: Final = array("Q")
# A process that is forked must not give out the same ids.
os.register_at_fork(after_in_child=lambda: _DRAWN.__delitem__(slice(None)))
