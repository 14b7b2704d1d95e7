"""The leases of a program on asyncio: `LeasedCounters` for limiters inside programs that are not ours.

Differences to those of a server: several event loops and threads may use them one after the other, or at once; a process may
fork; and a loop may end without `close`, as that of `asyncio.run` does. Then the units go back in the last turn of the loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from threading import get_ident

from tidegate.counters import Charge, ChargeOutcome, Counters
from tidegate.counters.forks import FORKS
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.leased import LeasedCounters
from tidegate.counters.locked_leases import LockedLeaseTable
from tidegate.counters.reservations import Reservation
from tidegate.errors import StoreUnavailable

logger = logging.getLogger(__name__)


class ProcessLeases(LeasedCounters):
    """The counters of a program, leased where that saves calls.

    Args:
        guarded: grants the leases; `close` closes it too.
        ttl_s: longest life of a lease, s.
        max_subjects: most leases.
    """

    make_table = LockedLeaseTable

    def __init__(self, guarded: GuardedCounters, ttl_s: float = 5.0, max_subjects: int = 100_000) -> None:
        super().__init__(guarded, ttl_s, max_subjects)
        self.guarded = guarded
        FORKS.add(self)

    async def charge(self, charges: Sequence[Charge]) -> Sequence[ChargeOutcome]:
        """See `CounterStore.charge`."""
        if len(charges) == 1 and len(charges[0].counters) == 1 and not charges[0].counters[0][0].leasable:
            return await self.guarded.charge(charges)
        return await super().charge(charges)

    async def reserve(self, counters: Counters, cost: int, ahead_us: int) -> Reservation:
        """See `ReservingCounterStore.reserve`: from the store, never from a lease."""
        return await self.guarded.reserve(counters, cost, ahead_us)

    async def release(self, reservation: Reservation) -> bool:
        """See `ReservingCounterStore.release`."""
        return await self.guarded.release(reservation)

    def forked(self) -> None:
        """See `OfOneProcess`."""
        self._loop, self._sweeper, self._work = None, None, set()

    def _renew_soon(self) -> None:
        loop = self._loop
        if loop is None or self._thread == get_ident():
            super()._renew_soon()
        elif not self._renewing and loop.is_running():
            # A check in another thread used the lease.
            self._renewing = True
            loop.call_soon_threadsafe(self._renew)

    async def _sweep(self) -> None:
        try:
            await super()._sweep()
        finally:
            if self._sweeper is asyncio.current_task():
                self._return_at_the_end()

    def _return_at_the_end(self) -> None:
        """The loop ends: write the returns now, for nothing can be awaited any more. Whether they arrive is not known."""
        self.table.drop()
        while returns := self.table.take_returns(self.return_batch):
            writing = self.guarded.give_back(returns)
            try:
                writing.send(None)
                for connection in self.guarded.store.connections():
                    connection.flush()
            except (StoreUnavailable, StopIteration) as error:
                logger.debug("leased units not given back at the end of the event loop: %s", error)
            finally:
                writing.close()
            for each in returns:
                self.table.settled(each, False)
