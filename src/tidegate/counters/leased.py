"""Counters that are leased: most checks are decided in memory, and all instances together still never admit more than a limit.

`LeasedCounters` wraps a store that grants leases (`LeaseGrantor`), which may be any: nothing here knows where it is. Units are
charged there before they are used here. What a lease is, is in `lease_table`; why it is exact, in `algorithms.leases` and
docs/leases.md.

While the store is unavailable, leases go on deciding until they end, exactly and not degraded; then the store's fallback does.
What they decide is charged already, so nothing of it is put back. A lease whose reply is lost, and what an instance that dies had
leased, stays charged: fewer are admitted, never more.

Not thread-safe: one event loop, any number of its tasks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import ClassVar, Final

import msgspec

from tidegate.background import SUPERVISOR, stop
from tidegate.counters import Charge, ChargeOutcome, Counters, GrantingDecision, LeaseGrantor
from tidegate.counters.adjustments import adjusting
from tidegate.counters.holds import HoldHandle, HoldSettlement, counting_holds, holding
from tidegate.counters.lease_table import LeaseTable, covers
from tidegate.counters.reservations import Reservation, ReservationHandle, naming_reservations, not_found
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import LimitSet

logger = logging.getLogger(__name__)

SWEEP_S: Final = 0.05
_SWEEP_STEPS: Final = 2_000
_RETURN_SOON: Final = 50
_RETURN_SWEEPS: Final = 5
"""Fewer leases than `_RETURN_SOON` wait until so many sweeps are over, so that one call gives back many."""
_MAX_DIVISOR: Final = 16
_SLOW_DIVISOR: Final = 4
"""How many times less of what remains is leased for longer."""
_DROP_AGAIN_S: Final = 0.4
_CLOSE_S: Final = 2.0
"""How long shutdown waits until the store has taken the units back."""


class LeasedCounters:
    """The counters of one instance, leased where that saves calls.

    Args:
        store: grants the leases; `close` closes it too.
        ttl_s: life of the leases of busy subjects, s.
        max_subjects: most leases.

    Attributes:
        table: the leases.
    """

    immediate = False
    make_table: ClassVar[type[LeaseTable]] = LeaseTable
    return_batch: ClassVar[int] = 1_000

    def __init__(self, store: LeaseGrantor, ttl_s: float = 5.0, max_subjects: int = 100_000) -> None:
        self.store = store
        self.table = self.make_table(round(ttl_s * 1e6), max_subjects)
        self.divide(_MAX_DIVISOR)
        self.table.on_renewal = self._renew_soon
        store.on_late_grant = self._accept_late
        store.on_reset = self.table.drop
        store.lease_usage, store.take_lease_usage = self.table.usage, self.table.take_usage
        store.denial_ttl_us = round(ttl_s * 1e6)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._sweeper: asyncio.Task[None] | None = None
        self._work: set[asyncio.Task[None]] = set()
        self._renewing = False

    def charge_now(self, counters: Counters, cost: int) -> Decision | None:
        """Decide from a lease, without waiting for anything.

        Args:
            counters: as those of a `Charge`.
            cost: as that of a `Charge`.

        Returns:
            The decision; None where `charge` must decide.
        """
        return self.table.take(counters, cost)

    async def charge(self, charges: Sequence[Charge]) -> Sequence[ChargeOutcome]:
        """See `CounterStore.charge`."""
        if len(charges) != 1:
            return await self._charge_many(charges)
        charge = charges[0]
        decision = self.table.take(charge.counters, charge.cost)
        if decision is not None:
            return (decision,)
        self._start()
        if not covers(charge) or not self.store.grants(charge.counters):
            outcomes = await self.store.charge(charges)
            self._confirm(charge, outcomes[0])
            return [self._with_unused(charge, outcomes[0])]
        sent_ns = time.monotonic_ns()
        request = self.table.request(charge.counters, charge.cost, sent_ns)
        if request is None:
            outcomes = await self.store.charge(charges)
            self.table.answered(charge.counters)
            self._confirm(charge, outcomes[0])
            return outcomes
        charge = Charge(charge.counters, charge.cost, request)
        outcomes = await self.store.charge((charge,))
        self.table.answered(charge.counters)
        if isinstance(outcomes[0], Decision):
            self.table.accept(charge.counters, request, outcomes[0], sent_ns, self.store.session(charge.counters))
        return outcomes

    async def open_hold(
        self, counters: Counters, cost: int, ttl_us: int, rule: str | None = None
    ) -> tuple[Decision, HoldHandle | None]:
        """See `HoldingCounterStore.open_hold`: from the store, never from a lease."""
        return await holding(self.store).open_hold(counters, cost, ttl_us, rule)

    async def settle_hold(self, handle: HoldHandle, cost: int, success: bool = False) -> HoldSettlement:
        """See `HoldingCounterStore.settle_hold`."""
        return await holding(self.store).settle_hold(handle, cost, success)

    async def count_holds(self, counters: Counters) -> Sequence[int]:
        """See `HoldCountingStore.count_holds`."""
        return await counting_holds(self.store).count_holds(counters)

    async def renew_hold(self, handle: HoldHandle, ttl_us: int) -> None:
        """See `HoldingCounterStore.renew_hold`."""
        await holding(self.store).renew_hold(handle, ttl_us)

    async def reserve_named(
        self, counters: Counters, cost: int, ahead_us: int
    ) -> tuple[Reservation, ReservationHandle | None] | None:
        """See `NamedReservingStore.reserve_named`: from the store, never from a lease."""
        store = naming_reservations(self.store)
        return None if store is None else await store.reserve_named(counters, cost, ahead_us)

    async def release_named(self, handle: ReservationHandle) -> bool:
        """See `NamedReservingStore.release_named`."""
        store = naming_reservations(self.store)
        if store is None:
            raise not_found()
        return await store.release_named(handle)

    async def adjust(self, counters: Counters, units: int) -> Decision:
        """See `AdjustingCounterStore.adjust`; leases stay as they are."""
        return await adjusting(self.store).adjust(counters, units)

    async def windows(self, counters: Sequence[tuple[LimitSet, str]]) -> Sequence[Sequence[Decision] | None]:
        """See `CounterStore.windows`; units leased by this instance count as not used, those of others as used."""
        found = await self.store.windows(counters)
        return [
            None if each is None else [self._add_unused(decision, limits, subject) for decision in each]
            for (limits, subject), each in zip(counters, found, strict=True)
        ]

    async def reset(self, counters: Sequence[tuple[LimitSet, str]]) -> None:
        """See `CounterStore.reset`; the other instances drop their leases within a second."""
        self.table.forget(counters)
        await self.store.reset(counters)

    def drop(self, of: Callable[[LimitSet, str], bool] | None = None) -> None:
        """Give up leases whose limits changed; their units are given back at once.

        Args:
            of: selects them by their counters; all where None.
        """
        self.table.drop(of)
        if self._loop is not None and self._loop.is_running():
            # Until the new limits are loaded, the old ones may be leased again.
            self._loop.call_later(_DROP_AGAIN_S, self.table.drop, of)

    async def ping(self) -> None:
        """See `CounterStore.ping`."""
        await self.store.ping()

    async def close(self) -> None:
        """See `CounterStore.close`: all leases are given back first."""
        sweeper, self._sweeper, self._loop = self._sweeper, None, None
        if sweeper is not None and sweeper.get_loop() is asyncio.get_running_loop():
            await stop(sweeper)
            if self._work:
                await asyncio.wait(tuple(self._work), timeout=_CLOSE_S)
        await self.give_back()
        await self.store.close()

    async def give_back(self) -> None:
        """Give back all leases, and wait until the store has answered, for a bounded time."""
        self.table.drop()
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._send_returns()
        except TimeoutError:
            logger.warning("Redis did not take back all leased units in time: they stay charged")

    def _start(self) -> None:
        # As in `GuardedCounters.charge`: finding the running loop makes a system call before Python 3.12.
        loop = self._loop
        if loop is not None and loop.is_running() and get_ident() == self._thread:
            return
        self._loop, self._thread = asyncio.get_running_loop(), get_ident()
        self._renewing = False
        sweeper = self._sweeper
        if sweeper is not None and not sweeper.done() and not sweeper.get_loop().is_closed():
            sweeper.get_loop().call_soon_threadsafe(sweeper.cancel)
        self._sweeper = SUPERVISOR.start("leases", self._sweep)

    async def _charge_many(self, charges: Sequence[Charge]) -> list[ChargeOutcome]:
        """What is not leased goes to the store in one call; leases of busy subjects are asked for beside it."""
        outcomes: list[ChargeOutcome | None] = [self.table.take(charge.counters, charge.cost) for charge in charges]
        undecided = [place for place, outcome in enumerate(outcomes) if outcome is None]
        if undecided:
            self._start()
            now_ns = time.monotonic_ns()
            for place in undecided:
                charge = charges[place]
                if covers(charge) and self.store.grants(charge.counters):
                    self.table.want_later(charge.counters, charge.cost, now_ns)
            decided = await self.store.charge([charges[place] for place in undecided])
            for place, outcome in zip(undecided, decided, strict=True):
                charge = charges[place]
                outcomes[place] = self._with_unused(charge, outcome)
                self._confirm(charge, outcome)
                if covers(charge):
                    self.table.answered(charge.counters)
        return [outcome for outcome in outcomes if outcome is not None]

    def _confirm(self, charge: Charge, outcome: ChargeOutcome) -> None:
        # A denial may be one that is remembered, an answer of before the store was lost.
        if isinstance(outcome, Decision) and outcome.allowed and not outcome.degraded:
            self.table.confirm(charge.counters)

    def _with_unused(self, charge: Charge, outcome: ChargeOutcome) -> ChargeOutcome:
        """The answer to a peek: what this instance has leased is still left to its callers."""
        if charge.cost or len(charge.counters) != 1 or not isinstance(outcome, Decision) or outcome.degraded:
            return outcome
        return self._add_unused(outcome, *charge.counters[0])

    def _add_unused(self, decision: Decision, limits: LimitSet, subject: str) -> Decision:
        unused = self.table.unused(limits, subject)
        if not unused or decision.remaining is None or decision.binding is None:
            return decision
        left = decision.remaining - decision.overage + unused
        return msgspec.structs.replace(decision, remaining=min(max(left, 0), decision.binding.capacity), overage=max(-left, 0))

    # Renewals and returns.

    def _renew_soon(self) -> None:
        # Called from the middle of a check: the requests are sent when the loop has its next turn.
        if not self._renewing and self._loop is not None and self._loop.is_running():
            self._renewing = True
            self._loop.call_soon(self._renew)

    def _renew(self) -> None:
        self._renewing = False
        for counters in self.table.take_renewals():
            task = asyncio.ensure_future(self._lease(counters))
            self._work.add(task)
            task.add_done_callback(self._work.discard)

    async def _lease(self, counters: Counters) -> None:
        """Ask for a lease with a check of cost 0."""
        sent_ns = time.monotonic_ns()
        request = self.table.renewal(counters, sent_ns) if self.store.grants(counters) else None
        if request is None:
            return
        charge = Charge(counters, 0, request)
        [outcome] = await self.store.charge((charge,))
        if isinstance(outcome, Decision):
            self.table.accept(counters, request, outcome, sent_ns, self.store.session(counters))

    def _accept_late(self, charge: Charge, decision: GrantingDecision, started_us: int) -> None:
        if charge.lease is not None:
            session = self.store.session(charge.counters)
            self.table.accept(charge.counters, charge.lease, decision, started_us * 1000, session)

    def divide(self, instances: int) -> None:
        """Lease less of what remains the more instances there are: close to a limit the last units must go to those that ask.

        Args:
            instances: that share the store.
        """
        divisor = 2 if instances <= 1 else min(2 * instances, _MAX_DIVISOR)
        self.table.divisor, self.table.slow_divisor = divisor, _SLOW_DIVISOR * divisor

    async def _sweep(self) -> None:
        sweeps = 0
        while True:
            await asyncio.sleep(SWEEP_S)
            if self.store.instances_known:
                self.divide(self.store.instances)
            self.table.sweep(_SWEEP_STEPS)
            sweeps += 1
            if self.table.urgent or len(self.table.returns) >= _RETURN_SOON or sweeps % _RETURN_SWEEPS == 0:
                await self._send_returns()

    async def _send_returns(self) -> None:
        self.table.urgent = False
        while returns := self.table.take_returns(self.return_batch):
            # Not sent again where it fails: the store may have taken them.
            taken: Sequence[bool] = ()
            try:
                taken = await self.store.give_back(returns)
            except StoreUnavailable as error:
                logger.debug("leased units not given back: %s", error)
            finally:
                for place, each in enumerate(returns):
                    self.table.settled(each, place < len(taken) and taken[place])
