"""What each algorithm promises, held against the admissions of one subject, given in the order of their latest moments.

An admission may be known only to lie between two moments. A proof counts it where it certainly was: what is reported is above the
limit wherever in their intervals the admissions happened. With moments that are known the proofs are exact both ways.

Nothing here is shared with the algorithms but the calendar: a fault of theirs must not hide itself.
"""

from __future__ import annotations

import heapq
from bisect import insort
from typing import NamedTuple, Protocol

from tidegate.algorithms.calendar import bounds_of
from tidegate.policy.limits import Algorithm, AnyAlgorithm, Limit


class Excess(NamedTuple):
    """More than a limit allows.

    Args:
        units: above it, at least.
        held: units that certainly were admitted between the two moments (weighted, for a sliding window).
        allowed: units that may be.
        from_us: µs since the epoch.
        to_us: µs since the epoch.
    """

    units: int
    held: int
    allowed: int
    from_us: int
    to_us: int


class Proof(Protocol):
    """Looks at the admissions of one subject under one limit."""

    def add(self, from_us: int, to_us: int, cost: int) -> Excess | None:
        """Take in the next admission; none may have an earlier `to_us` than the one before.

        Args:
            from_us: it did not happen before.
            to_us: nor after.
            cost: units, 1 or more.

        Returns:
            What is above the limit with it.
        """
        ...


def proof_of(algorithm: AnyAlgorithm, limit: Limit, widest_us: int) -> Proof:
    """The proof of a limit.

    Args:
        limit: what holds, its burst filled in.
        widest_us: no admission's interval is wider.

    Returns:
        A proof that has seen nothing.
    """
    if algorithm is Algorithm.FIXED_WINDOW:
        return FixedWindowProof(limit)
    if algorithm is Algorithm.SLIDING_WINDOW:
        return SlidingWindowProof(limit)
    if algorithm is Algorithm.SLIDING_LOG:
        return SlidingLogProof(limit)
    return BucketProof(limit, widest_us)


class FixedWindowProof:
    """No aligned window holds more than the amount."""

    def __init__(self, limit: Limit) -> None:
        self._limit = limit
        self._start = -1
        self._held = 0

    def add(self, from_us: int, to_us: int, cost: int) -> Excess | None:
        """See `Proof.add`."""
        start, end = _window(self._limit, to_us)
        if start != self._start:
            self._start, self._held = start, 0
        if from_us < start:
            return None  # in which of two windows it was is not known
        self._held += cost
        return _above(self._held, self._limit.amount, start, end)


class SlidingWindowProof:
    """At each admission, the window's units and what is left of those of the one before are not more than the amount.

    The last one of those that certainly happened in a window until some moment saw all the others of them, and the weight at its
    own moment was at least that of the later one.
    """

    def __init__(self, limit: Limit) -> None:
        self._limit = limit
        self._start = -1
        self._current = 0
        self._previous = 0

    def add(self, from_us: int, to_us: int, cost: int) -> Excess | None:
        """See `Proof.add`."""
        start, end = _window(self._limit, to_us)
        if start != self._start:
            follows = start > 0 and _window(self._limit, start - 1)[0] == self._start
            self._previous = self._current if follows else 0
            self._start, self._current = start, 0
        if from_us < start:
            return None
        self._current += cost
        held = self._current + self._previous * (end - to_us) // (end - start)
        return _above(held, self._limit.amount, start, to_us)


class SlidingLogProof:
    """No interval `(t − window, t]`, wherever it lies, holds more than the amount."""

    def __init__(self, limit: Limit) -> None:
        self._limit = limit
        self._inside: list[tuple[int, int]] = []
        self._held = 0

    def add(self, from_us: int, to_us: int, cost: int) -> Excess | None:
        """See `Proof.add`."""
        heapq.heappush(self._inside, (from_us, cost))
        self._held += cost
        while self._inside and self._inside[0][0] <= to_us - self._limit.window_us:
            self._held -= heapq.heappop(self._inside)[1]
        return _above(self._held, self._limit.amount, to_us - self._limit.window_us, to_us)


class BucketProof:
    """Between any two moments, not more than `burst + amount × elapsed / window`.

    For each later moment the earlier one that is worst is wanted. Of those that every further admission follows only the worst
    one is kept; the others lie within the widest interval and are gone through.

    Args:
        limit: what holds, its burst filled in.
        widest_us: no admission's interval is wider.
    """

    def __init__(self, limit: Limit, widest_us: int) -> None:
        self._limit = limit
        self._widest_us = widest_us
        self._recent: list[tuple[int, int]] = []
        self._units = 0
        self._since_us: int | None = None

    def add(self, from_us: int, to_us: int, cost: int) -> Excess | None:
        """See `Proof.add`."""
        insort(self._recent, (from_us, cost))
        done = 0
        while self._recent[done][0] < to_us - self._widest_us:
            self._settle(*self._recent[done])
            done += 1
        del self._recent[:done]
        held, worst = 0, None
        for place in range(len(self._recent) - 1, -1, -1):
            moment, units = self._recent[place]
            held += units
            worst = _worse(worst, self._between(moment, to_us, held))
        if self._since_us is not None:
            worst = _worse(worst, self._between(self._since_us, to_us, self._units + held))
        return worst

    def _settle(self, moment: int, units: int) -> None:
        """Keep the better of two earlier moments; in what follows their difference stays."""
        window, amount = self._limit.window_us, self._limit.amount
        if self._since_us is None or self._units * window + self._since_us * amount <= moment * amount:
            self._since_us, self._units = moment, 0
        self._units += units

    def _between(self, from_us: int, to_us: int, held: int) -> Excess | None:
        allowed = self._limit.capacity + self._limit.amount * (to_us - from_us) // self._limit.window_us
        return _above(held, allowed, from_us, to_us)


def _window(limit: Limit, moment_us: int) -> tuple[int, int]:
    if limit.is_calendar:
        return bounds_of(limit, moment_us)
    start = moment_us // limit.window_us * limit.window_us
    return start, start + limit.window_us


def _above(held: int, allowed: int, from_us: int, to_us: int) -> Excess | None:
    return Excess(held - allowed, held, allowed, from_us, to_us) if held > allowed else None


def _worse(one: Excess | None, other: Excess | None) -> Excess | None:
    if one is None or other is None:
        return one or other
    return max(one, other)
