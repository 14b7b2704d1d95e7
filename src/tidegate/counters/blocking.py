"""Counters for code without an event loop: the port, and counters in memory. Thread-safe. On Redis: see `blocking_redis`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from tidegate.counters import Charge, ChargeOutcome, Counters
from tidegate.counters.holds import HoldHandle, HoldSettlement
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.reservations import Reservation
from tidegate.decision import Decision
from tidegate.policy.limits import LimitSet


class BlockingCounterStore(Protocol):
    """`CounterStore` for threads: what returns at once there, or waits on a socket."""

    def charge_one(self, limits: LimitSet, subject: str, cost: int) -> Decision:
        """Decide and charge one counter; raises `StoreUnavailable` where the store fails and the limits say deny."""
        ...

    def charge_many(self, charges: Sequence[Charge]) -> Sequence[ChargeOutcome]:
        """Decide each charge on its own, in order."""
        ...

    def reset_many(self, counters: Sequence[tuple[LimitSet, str]]) -> None:
        """Reset counters to nothing consumed."""
        ...

    def disconnect(self) -> None:
        """Release the store's resources."""
        ...


class BlockingMemory(MemoryCounters):
    """`MemoryCounters` with a lock: for threads, and for an event loop beside them.

    Args:
        max_subjects: see `MemoryCounters`.
        clock: see `MemoryCounters`.
    """

    def __init__(self, max_subjects: int = 1_000_000, clock: Callable[[], int] | None = None) -> None:
        super().__init__(max_subjects, clock)
        self._lock = threading.RLock()

    def charge_one(self, limits: LimitSet, subject: str, cost: int) -> Decision:
        """See `MemoryCounters`."""
        with self._lock:
            return super().charge_one(limits, subject, cost)

    def charge_all(self, counters: tuple[tuple[LimitSet, str], ...], cost: int) -> Decision:
        """See `MemoryCounters`."""
        with self._lock:
            return super().charge_all(counters, cost)

    def open_hold_now(
        self, counters: Counters, cost: int, ttl_us: int, rule: str | None = None
    ) -> tuple[Decision, HoldHandle | None]:
        """See `MemoryHolds`."""
        with self._lock:
            return super().open_hold_now(counters, cost, ttl_us, rule)

    def settle_hold_now(self, handle: HoldHandle, cost: int, success: bool = False) -> HoldSettlement:
        """See `MemoryHolds`."""
        with self._lock:
            return super().settle_hold_now(handle, cost, success)

    def renew_hold_now(self, handle: HoldHandle, ttl_us: int) -> None:
        """See `MemoryHolds`."""
        with self._lock:
            super().renew_hold_now(handle, ttl_us)

    def charge_many(self, charges: Sequence[Charge]) -> list[Decision]:
        """See `BlockingCounterStore`."""
        return [self.charge_all(charge.counters, charge.cost) for charge in charges]

    async def windows(self, counters: Sequence[tuple[LimitSet, str]]) -> list[tuple[Decision, ...]]:
        """See `MemoryCounters`."""
        with self._lock:
            return await super().windows(counters)  # awaits nothing

    def reserve_blocking(self, counters: Counters, cost: int, ahead_us: int) -> Reservation:
        """See `BlockingReservingStore`."""
        with self._lock:
            return self._reserve(counters, cost, ahead_us)

    def release_blocking(self, reservation: Reservation) -> bool:
        """See `BlockingReservingStore`."""
        with self._lock:
            return self._release(reservation)

    async def reserve(self, counters: Counters, cost: int, ahead_us: int) -> Reservation:
        """See `ReservingCounterStore.reserve`."""
        return self.reserve_blocking(counters, cost, ahead_us)

    async def release(self, reservation: Reservation) -> bool:
        """See `ReservingCounterStore.release`."""
        return self.release_blocking(reservation)

    def reset_many(self, counters: Sequence[tuple[LimitSet, str]]) -> None:
        """See `BlockingCounterStore`."""
        with self._lock:
            self._reset(counters)

    async def reset(self, counters: Sequence[tuple[LimitSet, str]]) -> None:
        """See `CounterStore.reset`."""
        self.reset_many(counters)

    def clear(self) -> None:
        """See `MemoryStorage`."""
        with self._lock:
            super().clear()

    def disconnect(self) -> None:
        """See `BlockingCounterStore`."""
        self.clear()
