"""Leases for code without an event loop: scripts, threads, WSGI workers. Thread-safe; the rules are those of `leased`.

A lease that runs out is asked for again with the check that finds it empty, not before. Units that are not used go back from a
thread of the process, which runs while there are leases; when the store is closed; and when the interpreter exits. A process
that is killed loses them: fewer are admitted until their window ends, never more.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Final, cast
from weakref import WeakSet

from tidegate.counters import Charge, ChargeOutcome, Counters, LeaseGrantor, LeaseReturn
from tidegate.counters.blocking_redis import BlockingRedis
from tidegate.counters.forks import FORKS
from tidegate.counters.holds import HoldHandle, HoldSettlement
from tidegate.counters.lease import Lease
from tidegate.counters.leased import SWEEP_S, LeasedCounters
from tidegate.counters.locked_leases import LockedLeaseTable
from tidegate.counters.redis.blocking_connection import run_blocking
from tidegate.counters.reservations import Reservation
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import LimitSet

logger = logging.getLogger(__name__)

_JOIN_S: Final = 1.0
_SWEEP_STEPS: Final = 2_000
_ENDS_SOON_NS: Final = 150_000_000


class _Table(LockedLeaseTable):
    """Leases that nothing renews beside the checks."""

    def _renew(self, lease: Lease, now_ns: int) -> None:
        if now_ns >= lease.expires_ns - _ENDS_SOON_NS:
            # The next check asks for another; a bucket takes nothing back afterwards.
            self._drop(lease, now_ns)


class _Grantor:
    """The store as `LeasedCounters` calls it; its coroutines wait for nothing."""

    immediate = False
    on_late_grant: object = None
    denial_ttl_us: int | None = None
    """Neither is used: a blocking call has no late answer, and remembers no denial."""

    def __init__(self, store: BlockingRedis) -> None:
        self._store = store

    async def charge(self, charges: Sequence[Charge]) -> Sequence[ChargeOutcome]:
        return self._store.charge_many(charges)

    def grants(self, _: Counters) -> bool:
        return self._store.grants

    def session(self, counters: Counters) -> object:
        return self._store.store.session(counters)

    async def give_back(self, returns: Sequence[LeaseReturn]) -> list[bool]:
        return await self._store.store.give_back(returns)


class _Leased(LeasedCounters):
    """`LeasedCounters` without an event loop; run with `run_blocking`."""

    make_table = _Table
    return_batch = 200  # less than the deadline of a call, for a server that runs them

    def _start(self) -> None:
        """Nothing runs in an event loop."""

    def renew(self) -> None:
        """Ask for the leases that checks of batches wanted."""
        for counters in self.table.take_renewals():
            run_blocking(self._lease(counters))

    def send_returns(self) -> None:
        """Give back what was given up."""
        run_blocking(self._send_returns())


class LeaseKeeper:
    """Runs some work every `SWEEP_S` in a thread, as long as there is any. Not across a fork: the thread is not copied.

    Args:
        work: what is run.
        is_left: whether there is anything to run it for.
    """

    def __init__(self, work: Callable[[], None], is_left: Callable[[], bool]) -> None:
        self._work = work
        self._is_left = is_left
        self._begin()
        FORKS.add(self)
        _KEEPERS.add(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    forked = _begin

    def start(self) -> bool:
        """Begin, where it does not run.

        Returns:
            Whether it runs: not while the interpreter exits.
        """
        with self._lock:
            if self._thread is None:
                self._stop = threading.Event()
                self._thread = threading.Thread(target=self._run, args=(self._stop,), name="tidegate-leases", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:
                    self._thread = None
                    return False
        return True

    def stop(self) -> bool:
        """End it, and wait until it has, for a bounded time.

        Returns:
            Whether it ran.
        """
        with self._lock:
            thread, self._thread = self._thread, None
            self._stop.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_S)
        return thread is not None

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(SWEEP_S):
            try:
                self._work()
            except Exception:  # the thread must go on: units would wait here until their windows end
                logger.exception("leases not swept, trying again")
            with self._lock:
                if not stop.is_set() and not self._is_left():
                    self._thread = None
                    return


_KEEPERS: Final[WeakSet[LeaseKeeper]] = WeakSet()
_paused: list[LeaseKeeper] = []


def _pause_all() -> None:
    """Before a fork: a thread that holds a lock, or a socket, would leave it so in the child."""
    _paused[:] = [keeper for keeper in list(_KEEPERS) if keeper.stop()]


def _resume_all() -> None:
    for keeper in _paused:
        keeper.start()
    _paused.clear()


class BlockingLeases:
    """The counters of `BlockingRedis`, leased where that saves calls.

    Args:
        store: grants the leases; `disconnect` closes it too.
        ttl_s: longest life of a lease, s.
        max_subjects: most leases.
    """

    def __init__(self, store: BlockingRedis, ttl_s: float = 5.0, max_subjects: int = 100_000) -> None:
        self.store = store
        self._leased = _Leased(cast("LeaseGrantor", _Grantor(store)), ttl_s, max_subjects)
        self.table = table = self._leased.table
        table.on_renewal = None
        store.on_reset, store.take_lease_usage = table.drop, table.take_usage
        self._keeper = LeaseKeeper(self._sweep, lambda: bool(table.leases or table.renewals or table.returns))
        _STORES.add(self)

    def charge_one(self, limits: LimitSet, subject: str, cost: int) -> Decision:
        """See `BlockingCounterStore`."""
        counters = ((limits, subject),)
        decision = self.table.take(counters, cost)
        if decision is not None:
            return decision
        outcome = self.charge_many((Charge(counters, cost),))[0]
        if isinstance(outcome, StoreUnavailable):
            raise outcome
        return outcome

    def charge_many(self, charges: Sequence[Charge]) -> Sequence[ChargeOutcome]:
        """See `BlockingCounterStore`."""
        outcomes = run_blocking(self._leased.charge(charges))
        if (self.table.leases or self.table.renewals) and not self._keeper.start():
            self.give_back()
        return outcomes

    def open_hold_now(
        self, counters: Counters, cost: int, ttl_us: int, rule: str | None = None
    ) -> tuple[Decision, HoldHandle | None]:
        """See `HoldingCounterStore.open_hold`: from the store, never from a lease."""
        return self.store.open_hold_now(counters, cost, ttl_us, rule)

    def settle_hold_now(self, handle: HoldHandle, cost: int) -> HoldSettlement:
        """See `HoldingCounterStore.settle_hold`."""
        return self.store.settle_hold_now(handle, cost)

    def renew_hold_now(self, handle: HoldHandle, ttl_us: int) -> None:
        """See `HoldingCounterStore.renew_hold`."""
        self.store.renew_hold_now(handle, ttl_us)

    def reserve_blocking(self, counters: Counters, cost: int, ahead_us: int) -> Reservation:
        """See `BlockingReservingStore`: from the store, never from a lease."""
        return self.store.reserve_blocking(counters, cost, ahead_us)

    def release_blocking(self, reservation: Reservation) -> bool:
        """See `BlockingReservingStore`."""
        return self.store.release_blocking(reservation)

    def reset_many(self, counters: Sequence[tuple[LimitSet, str]]) -> None:
        """See `BlockingCounterStore`; other processes drop their leases within a second."""
        self.table.forget(counters)
        self.store.reset_many(counters)

    def give_back(self) -> None:
        """Give back all leases."""
        self.table.drop()
        self._leased.send_returns()

    def disconnect(self) -> None:
        """See `BlockingCounterStore`: all leases are given back first."""
        self._keeper.stop()
        self.give_back()
        self.store.disconnect()

    def _sweep(self) -> None:
        self.store.beat_if_due()
        self._leased.divide(self.store.instances)
        self.table.sweep(_SWEEP_STEPS)
        self._leased.renew()
        self._leased.send_returns()


_STORES: Final[WeakSet[BlockingLeases]] = WeakSet()


def _give_back_all() -> None:
    """At exit: what is open may have no other owner than the interpreter."""
    for store in list(_STORES):
        store.give_back()


atexit.register(_give_back_all)
os.register_at_fork(before=_pause_all, after_in_parent=_resume_all, after_in_child=_paused.clear)
