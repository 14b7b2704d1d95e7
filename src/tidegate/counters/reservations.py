"""Reservations: the moment at which a caller may go, in order of asking; the ports of the stores that give them."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Final, Protocol, runtime_checkable

import msgspec

from tidegate.algorithms.reservations import RESERVABLE
from tidegate.counters import Counters
from tidegate.decision import Decision
from tidegate.policy.limits import LimitSet
from tidegate.timestamps import US_PER_S

MAX_AHEAD_US: Final = 366 * 86_400 * US_PER_S
"""How far ahead a moment may be, µs."""


class Reservation(msgspec.Struct, frozen=True, gc=False):
    """A place in the order of asking: units that are charged for a moment, now or later.

    Args:
        decision: `allowed` where there is a place; `remaining` is what is left after it. A denial charged nothing, and its
            `retry_after` says how long the caller would have had to wait.
        counters: that were charged; empty where nothing was.
        cost: units.
        at_us: the moment, µs since the epoch, by the store's clock; 0 for a denial.
    """

    decision: Decision
    counters: Counters = ()
    cost: int = 1
    at_us: int = 0

    @property
    def allowed(self) -> bool:
        """Whether there is a place."""
        return self.decision.allowed

    @property
    def wait_s(self) -> float:
        """Seconds from the reservation to its moment; 0 where the caller may go at once, or has no place."""
        return max(self.at_us - self.decision.at_us, 0) / US_PER_S

    @property
    def at(self) -> datetime.datetime:
        """The moment, UTC: as `eta` of a task queue."""
        return datetime.datetime.fromtimestamp(max(self.at_us, self.decision.at_us) / US_PER_S, datetime.UTC)


@runtime_checkable
class ReservingCounterStore(Protocol):
    """A `CounterStore` that gives reservations. Counters of one reservation must lie on one shard."""

    async def reserve(self, counters: Counters, cost: int, ahead_us: int) -> Reservation:
        """Charge a cost for the first moment at which it passes all limits.

        Args:
            counters: see there; of algorithms that can be reserved.
            cost: units, 0 (reads the moment and charges nothing) or more.
            ahead_us: how far ahead the moment may be, µs, 0 or more.

        Returns:
            The reservation. While the store is unavailable the fallback decides whether the caller may go now.

        Raises:
            StoreUnavailable: if the store fails and the limits say deny.
        """
        ...

    async def release(self, reservation: Reservation) -> bool:
        """Cancel a reservation before its moment.

        Args:
            reservation: of this store.

        Returns:
            Whether all its units are available again; not after its moment.

        Raises:
            StoreUnavailable: if the store does not answer.
        """
        ...


@runtime_checkable
class BlockingReservingStore(Protocol):
    """A `BlockingCounterStore` that gives reservations; see `ReservingCounterStore`."""

    def reserve_blocking(self, counters: Counters, cost: int, ahead_us: int) -> Reservation:
        """As `ReservingCounterStore.reserve`."""
        ...

    def release_blocking(self, reservation: Reservation) -> bool:
        """As `ReservingCounterStore.release`."""
        ...


def can_reserve(limit_sets: Sequence[LimitSet]) -> bool:
    """Whether the algorithms of all these limits can be reserved."""
    return all(limits.algorithm in RESERVABLE and not limits.soft for limits in limit_sets)


def decided_now(decision: Decision, counters: Counters, cost: int) -> Reservation:
    """A reservation for now, or none, by the decision of a check."""
    return Reservation(decision, counters if decision.allowed else (), cost, decision.at_us if decision.allowed else 0)


def ahead_us_of(at_most_s: float) -> int:
    """How far ahead a moment may be, µs, for a caller that waits so long at most."""
    return MAX_AHEAD_US if at_most_s >= MAX_AHEAD_US / US_PER_S else int(at_most_s * US_PER_S)
