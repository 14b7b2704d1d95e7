"""Holds while the store may be unavailable.

A hold that the store cannot open in time is decided as a check of its cost is: by the rule's `on_failure`, degraded. Nothing is
reserved then, what the fallback admitted stays charged, and settling it has no effect. A hold that is open in the store can be
settled only there: until it answers, its settlement fails and may be tried again.

A charge above the limits is decided by the fallback as a check is, while the store does not answer; units are given back by the
store only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import msgspec

from tidegate.counters import Charge, ChargeOutcome, Counters
from tidegate.counters.holds import HoldHandle, new_id
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable


class HoldsInRedis(Protocol):
    """What this needs of the store."""

    async def open_hold(
        self, counters: Counters, cost: int, ttl_us: int, rule: str | None = None
    ) -> tuple[Decision, HoldHandle | None]:
        """See `HoldingCounterStore`."""
        ...

    async def adjust(self, counters: Counters, units: int) -> Decision:
        """See `AdjustingCounterStore`."""
        ...


class GuardedHolds(msgspec.Struct, frozen=True):
    """Opens and settles the holds of a guarded store.

    Args:
        admit: says before a charge what decides it instead of the store; None where the store decides.
        failed: what decides a charge that the store did not answer in time.
        succeeded: called when the store has answered.
        gave_back: called when units are free that were not before.
    """

    store: HoldsInRedis
    admit: Callable[[Charge, int], Coroutine[Any, Any, ChargeOutcome | None]]
    failed: Callable[[Charge, StoreUnavailable, int], ChargeOutcome]
    succeeded: Callable[[Charge], None]
    gave_back: Callable[[], None]

    async def open(self, counters: Counters, cost: int, ttl_us: int, rule: str | None) -> tuple[Decision, HoldHandle | None]:
        """See `HoldingCounterStore.open_hold`: while a breaker is open, or usage is still to be added to the store."""
        charge = Charge(counters, cost)
        started_us = time.monotonic_ns() // 1000
        outcome = await self.admit(charge, started_us)
        if outcome is None:
            try:
                opened = await self.store.open_hold(counters, cost, ttl_us, rule)
            except StoreUnavailable as error:
                return self.open_failed(charge, error, rule, started_us)
            self.succeeded(charge)
            return opened
        return _without_store(outcome, charge, rule)

    def open_failed(
        self, charge: Charge, error: StoreUnavailable, rule: str | None, started_us: int
    ) -> tuple[Decision, HoldHandle | None]:
        """What becomes of a hold that the store did not open in time.

        Raises:
            StoreUnavailable: where the rule denies while the store is unavailable.
        """
        return _without_store(self.failed(charge, error, started_us), charge, rule)

    async def adjust(self, counters: Counters, units: int) -> Decision:
        """See `AdjustingCounterStore.adjust`."""
        charge = Charge(counters, max(units, 0))
        started_us = time.monotonic_ns() // 1000
        outcome = await self.admit(charge, started_us)
        if outcome is None:
            try:
                decision = await self.store.adjust(counters, units)
            except StoreUnavailable as error:
                outcome = self.failed(charge, error, started_us)
            else:
                self.succeeded(charge)
                if units < 0:
                    self.gave_back()
                return decision
        if isinstance(outcome, StoreUnavailable):
            raise outcome
        return outcome


def _without_store(outcome: ChargeOutcome, charge: Charge, rule: str | None) -> tuple[Decision, HoldHandle | None]:
    if isinstance(outcome, StoreUnavailable):
        raise outcome
    return outcome, HoldHandle(new_id(), charge.cost, rule, counted=False) if outcome.allowed else None
