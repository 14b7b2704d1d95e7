"""Holds of limited calls: opened before a call, settled by its outcome.

A call with a concurrency limit keeps its slot until it has ended: a request of Flask, Django or WSGI until the last byte of its
response was sent or it was abandoned, other calls until they return or raise. One thread of the process renews the holds of calls
that last long. It also settles holds whose responses were dropped without being closed, because a middleware answered otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
from typing import Final
from weakref import WeakSet

from tidegate.counters import Counters
from tidegate.counters.blocking import BlockingMemory
from tidegate.counters.holds import MAX_TTL_S, HoldHandle, HoldSettlement
from tidegate.decision import Decision
from tidegate.doors.stores import SharedStore
from tidegate.errors import TidegateError
from tidegate.policy.limits import LimitSet
from tidegate.timestamps import US_PER_S

logger = logging.getLogger(__name__)

TTL_S: Final = 60
"""After how many seconds the slot of a process that died is free."""
_RENEW_S: Final = TTL_S / 3
_ENDING: Final[set[asyncio.Task[HoldSettlement | None]]] = set()
"""Settlements of tasks that were cancelled."""


class OpenHold:
    """A step of a call: reserve its cost, and a slot.

    Args:
        counters: of the call.
        cost: units.
    """

    __slots__ = ("_cost", "_counters")

    def __init__(self, counters: Counters, cost: int) -> None:
        self._counters = counters
        self._cost = cost

    def run(self, store: SharedStore) -> tuple[Decision, HoldHandle | None]:
        """Open it, from a thread."""
        return store.open_hold(self._counters, self._cost, _ttl_us(store), self._counters[0][0].rule)

    async def run_async(self, store: SharedStore) -> tuple[Decision, HoldHandle | None]:
        """Open it, from an event loop."""
        return await store.open_hold_async(self._counters, self._cost, _ttl_us(store), self._counters[0][0].rule)


class CallHold:
    """The hold of a call, as a step that settles it.

    Args:
        store: in which it is open.
        handle: the hold.
        limits: of which it reserved units; None where it took a slot alone.
        cost: units that it reserved.
        has_slot: whether it took a slot.

    Attributes:
        used: units that its settlement charges.
    """

    __slots__ = ("__weakref__", "_handle", "_renewed_s", "_settled", "_store", "cost", "has_slot", "limits", "used")

    def __init__(self, store: SharedStore, handle: HoldHandle, limits: LimitSet | None, cost: int, has_slot: bool) -> None:
        self._store = store
        self._handle = handle
        self._settled = not handle.counted  # opened while the store was unavailable: it has no effect
        self.limits = limits
        self.cost = self.used = cost
        self.has_slot = has_slot
        self._renewed_s = time.monotonic()
        if has_slot and not self._settled and _thread_safe(store):
            RENEWALS.add(self)

    def run(self, store: SharedStore) -> HoldSettlement | None:
        """Settle it, from a thread; None where that was done before, or the store does not answer."""
        if self._settled:
            return None
        self._settled = True
        try:
            return store.settle_hold(self._handle, self.used)
        except TidegateError as error:
            _not_settled(error)
            return None

    async def run_async(self, store: SharedStore) -> HoldSettlement | None:
        """Settle it, from an event loop; also where the task is cancelled. None as for `run`."""
        if self._settled:
            return None
        self._settled = True
        try:
            return await self._settle_async(store)
        except asyncio.CancelledError:
            # It must not cancel the settlement: that is sent again, which is safe.
            task = asyncio.ensure_future(self._settle_async(store))
            _ENDING.add(task)
            task.add_done_callback(_ENDING.discard)
            raise

    async def _settle_async(self, store: SharedStore) -> HoldSettlement | None:
        try:
            return await store.settle_hold_async(self._handle, self.used)
        except TidegateError as error:
            _not_settled(error)
            return None

    def close(self) -> None:
        """Settle it when the response was sent."""
        self.run(self._store)

    def renew(self, now_s: float) -> None:
        """Let it expire later, if it was opened or renewed some time ago.

        Args:
            now_s: of the monotonic clock.
        """
        if self._settled or now_s - self._renewed_s < _RENEW_S:
            return
        try:
            self._store.renew_hold(self._handle, _ttl_us(self._store))
        except TidegateError as error:
            logger.debug("slot of a call in progress not renewed, trying again: %s", error)
        else:
            self._renewed_s = now_s

    def __del__(self) -> None:
        if self._settled or not self.has_slot:
            return
        if _thread_safe(self._store):
            # Here locks may be held that a store needs: another thread settles it.
            RENEWALS.settle_later(self._store, self._handle, self.used)
        else:
            self.close()


class Renewals:
    """Renews the holds of calls in progress, and settles those that were dropped, in a thread that runs while there are any."""

    def __init__(self) -> None:
        self.start_anew()

    def start_anew(self) -> None:
        """Forget everything: in a forked process, whose parent renews its own calls."""
        self._lock = threading.Lock()
        self._calls: WeakSet[CallHold] = WeakSet()
        self._dropped: queue.SimpleQueue[tuple[SharedStore, HoldHandle, int]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, call: CallHold) -> None:
        """Renew the hold of a call from now on, as long as the call exists."""
        with self._lock:
            self._calls.add(call)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tidegate-renewals", daemon=True)
                self._thread.start()

    def settle_later(self, store: SharedStore, handle: HoldHandle, used: int) -> None:
        """Settle a hold in the thread.

        Args:
            store: in which it is open.
            handle: the hold.
            used: units that it is charged.
        """
        self._dropped.put((store, handle, used))

    def renew_all(self, now_s: float) -> int:
        """Renew the holds that are due.

        Args:
            now_s: of the monotonic clock.

        Returns:
            How many calls are in progress.
        """
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            call.renew(now_s)
        return len(calls)

    def _run(self) -> None:
        idle_since = due_s = time.monotonic()
        while True:
            try:
                store, handle, used = self._dropped.get(timeout=1)
            except queue.Empty:
                pass
            else:
                _settle(store, handle, used)
            now_s = time.monotonic()
            if now_s < due_s:
                continue
            due_s = now_s + _RENEW_S / 4
            if self.renew_all(now_s):
                idle_since = now_s
            with self._lock:
                if now_s - idle_since > TTL_S and not self._calls and self._dropped.empty():
                    self._thread = None
                    return


def _settle(store: SharedStore, handle: HoldHandle, used: int) -> None:
    try:
        store.settle_hold(handle, used)
    except TidegateError as error:
        _not_settled(error)


def _not_settled(error: TidegateError) -> None:
    logger.warning("hold of a limited call was not settled, it ends when it expires: %s", error)


def _thread_safe(store: SharedStore) -> bool:
    """Whether another thread may use a store."""
    return not store.needs_loop and (store.memory is None or isinstance(store.memory, BlockingMemory))


def _ttl_us(store: SharedStore) -> int:
    """After how many µs a hold expires. Counters in memory end with the process, and with them its holds."""
    return (TTL_S if store.memory is None else MAX_TTL_S) * US_PER_S


STEPS: Final = (OpenHold, CallHold)
RENEWALS: Final = Renewals()
os.register_at_fork(after_in_child=RENEWALS.start_anew)
