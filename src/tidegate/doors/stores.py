"""The stores that Python code names by URL: one for each URL in a process, for threads and event loops alike.

Also what tests change for all of them at once: the clock of the counters in memory, and whether limits deny at all.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Final
from weakref import WeakSet

from tidegate.counters import Charge, Counters, CounterStore, LeasingCounterStore
from tidegate.counters.blocking import BlockingCounterStore, BlockingMemory
from tidegate.counters.factory import embedded_leases, open_blocking, open_counters
from tidegate.counters.holds import (
    BlockingHoldingStore,
    HoldHandle,
    HoldingCounterStore,
    HoldSettlement,
    blocking_holding,
    holding,
)
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.storage_uri import counters_url
from tidegate.decision import Decision
from tidegate.errors import SettingsError, StoreUnavailable
from tidegate.policy.limits import LimitSet
from tidegate.settings import CounterSettings

COUNTERS_VARIABLE: Final = "TIDEGATE_COUNTERS__URL"
"""Environment variable with the URL of the counters, where a program names none: the server reads the same one."""
TIMEOUT_VARIABLE: Final = "TIDEGATE_COUNTERS__TIMEOUT_MS"
"""Environment variable with the deadline of a check on Redis, ms: the server reads the same one."""
_MAX_TIMEOUT_MS: Final = 60_000


class TestSwitches:
    """What tests change for the stores of this process; see `tidegate.testing`.

    Attributes:
        enforced: whether limits deny; while they do not, nothing is counted either.
        clock: of counters in memory; None for the machine's.
    """

    __test__ = False  # for pytest, which collects classes by name

    def __init__(self) -> None:
        self.enforced = True
        self.clock: Callable[[], int] | None = None
        self.memory: WeakSet[MemoryCounters] = WeakSet()


SWITCHES: Final = TestSwitches()


def open_memory_or_redis(counters: str | CounterStore, leases: bool | None = None) -> CounterStore:
    """The store of a `Limiter`: counters in memory are its own.

    Args:
        counters: URL, or a store, which is returned as it is.
        leases: see `embedded_leases`.

    Raises:
        SettingsError: if the URL is not understood.
    """
    if not isinstance(counters, str):
        return counters
    store = open_counters(_settings(counters), clock=SWITCHES.clock, leases=embedded_leases(leases), embedded=True)
    if isinstance(store, MemoryCounters):
        SWITCHES.memory.add(store)
    return store


def open_blocking_store(counters: str | BlockingCounterStore, leases: bool | None = None) -> BlockingCounterStore:
    """The store of a `SyncLimiter`: counters in memory are its own.

    Args:
        counters: URL, or a store for threads.
        leases: see `embedded_leases`.

    Raises:
        SettingsError: if the URL is not understood, or the store needs an event loop.
    """
    if not isinstance(counters, str):
        if not hasattr(counters, "charge_one") or not hasattr(counters, "disconnect"):
            raise SettingsError(
                f"counters {type(counters).__name__} cannot be used without an event loop: give a URL such as "
                "'memory://' or 'redis://127.0.0.1:6379'"
            )
        return counters
    store = open_blocking(_settings(counters), clock=SWITCHES.clock, leases=embedded_leases(leases))
    if isinstance(store, BlockingMemory):
        SWITCHES.memory.add(store)
    return store


def _no_lease(limits: LimitSet, subject: str, cost: int) -> Decision | None:  # noqa: ARG001
    return None


class SharedStore:
    """A store for functions of both kinds, `def` and `async def`. On Redis each kind has connections, and leases, of its own.

    Args:
        counters: URL, or a store.

    Attributes:
        memory: the counters, where they are in memory.
        take: decides a call in an event loop from a lease; gives None where `decide_async` must.
    """

    def __init__(self, counters: str | CounterStore) -> None:
        self._url = counters if isinstance(counters, str) else None
        self._lock = threading.Lock()
        self.memory: MemoryCounters | None = None
        self.take = _no_lease
        self._shared: CounterStore | None = None
        self._blocking: BlockingCounterStore | None = None
        if isinstance(counters, str):
            # Whether a limit is leased is its own matter: `LimitSet.leasable`.
            blocking = open_blocking_store(counters, leases=True)
            self._blocking = blocking
            if isinstance(blocking, BlockingMemory):
                self.memory = blocking
        elif isinstance(counters, MemoryCounters):
            self.memory = counters
        else:
            self._use(counters)

    @property
    def needs_loop(self) -> bool:
        """Whether it can be used in `async def` functions only."""
        return self.memory is None and self._blocking is None

    def decide(self, limits: LimitSet, subject: str, cost: int) -> Decision:
        """Decide and charge, from a thread without an event loop."""
        if self.memory is not None:
            return self.memory.charge_one(limits, subject, cost)
        if self._blocking is None:
            raise SettingsError("this counter store needs an event loop: give the URL of a store as counters")
        return self._blocking.charge_one(limits, subject, cost)

    async def decide_async(self, limits: LimitSet, subject: str, cost: int) -> Decision:
        """Decide and charge, from an event loop."""
        if self.memory is not None:
            return self.memory.charge_one(limits, subject, cost)
        outcome = (await self._of_loop().charge((Charge(((limits, subject),), cost),)))[0]
        if isinstance(outcome, StoreUnavailable):
            raise outcome
        return outcome

    def _of_loop(self) -> CounterStore:
        """The store for event loops, where the counters are not in memory."""
        if self._shared is None:
            with self._lock:
                if self._shared is None:
                    assert self._url is not None
                    self._use(open_counters(_settings(self._url), leases=embedded_leases(True), embedded=True))
        assert self._shared is not None
        return self._shared

    def _use(self, store: CounterStore) -> None:
        if isinstance(store, LeasingCounterStore):
            decide = store.charge_now
            self.take = lambda limits, subject, cost: decide(((limits, subject),), cost)
        self._shared = store

    @property
    def keeps_holds(self) -> bool:
        """Whether it keeps holds: all stores of Tidegate do."""
        return not self.needs_loop or isinstance(self._shared, HoldingCounterStore)

    def _holding(self) -> BlockingHoldingStore:
        if self.memory is None and self._blocking is None:
            raise SettingsError("this counter store needs an event loop: give the URL of a store as counters")
        return blocking_holding(self._blocking if self.memory is None else self.memory)

    def open_hold(self, counters: Counters, cost: int, ttl_us: int, rule: str | None) -> tuple[Decision, HoldHandle | None]:
        """See `HoldingCounterStore.open_hold`; from a thread without an event loop."""
        return self._holding().open_hold_now(counters, cost, ttl_us, rule)

    async def open_hold_async(
        self, counters: Counters, cost: int, ttl_us: int, rule: str | None
    ) -> tuple[Decision, HoldHandle | None]:
        """See `HoldingCounterStore.open_hold`."""
        if self.memory is not None:
            return self.memory.open_hold_now(counters, cost, ttl_us, rule)
        return await holding(self._of_loop()).open_hold(counters, cost, ttl_us, rule)

    def settle_hold(self, handle: HoldHandle, cost: int) -> HoldSettlement:
        """See `HoldingCounterStore.settle_hold`; from a thread without an event loop."""
        return self._holding().settle_hold_now(handle, cost)

    async def settle_hold_async(self, handle: HoldHandle, cost: int) -> HoldSettlement:
        """See `HoldingCounterStore.settle_hold`."""
        if self.memory is not None:
            return self.memory.settle_hold_now(handle, cost)
        return await holding(self._of_loop()).settle_hold(handle, cost)

    def renew_hold(self, handle: HoldHandle, ttl_us: int) -> None:
        """See `HoldingCounterStore.renew_hold`; from a thread without an event loop."""
        self._holding().renew_hold_now(handle, ttl_us)

    async def close(self) -> None:
        """Close connections; the next decision opens new ones."""
        if self._url is not None and (shared := self._shared) is not None:
            self._shared, self.take = None, _no_lease
            await shared.close()
        if self._blocking is not None and self.memory is None:
            self._blocking.disconnect()


_SHARED: Final[dict[str, SharedStore]] = {}
_LOCK: Final = threading.Lock()


def shared_store(counters: str | CounterStore | None) -> SharedStore:
    """The store of a URL, the same one for all who name it: limits of one scope count together.

    Args:
        counters: URL, a store, or None for the environment's URL, else memory.

    Raises:
        SettingsError: if the URL is not understood.
    """
    if counters is None:
        counters = os.environ.get(COUNTERS_VARIABLE) or "memory://"
    if not isinstance(counters, str):
        return SharedStore(counters)
    url = counters_url(counters)
    with _LOCK:
        known = _SHARED.get(url)
        if known is None:
            known = _SHARED[url] = SharedStore(url)
    return known


async def close_shared() -> None:
    """Close the connections of all shared stores that belong to the running event loop, or to threads."""
    for store in list(_SHARED.values()):
        await store.close()


def _settings(uri: str) -> CounterSettings:
    """Settings of a store that is named by URL."""
    text = os.environ.get(TIMEOUT_VARIABLE)
    if not text:
        return CounterSettings(url=counters_url(uri))
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= _MAX_TIMEOUT_MS):
        raise SettingsError(f"{TIMEOUT_VARIABLE} {text[:40]!r} must be a whole number from 1 to {_MAX_TIMEOUT_MS}")
    return CounterSettings(url=counters_url(uri), timeout_ms=int(text))
