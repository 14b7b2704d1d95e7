"""Holds of `Limiter` and `SyncLimiter`: context managers that reserve a cost, and charge what was used when they end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self, TypeAlias

from tidegate.counters import Counters
from tidegate.counters.holds import HoldHandle, HoldingCounterStore, HoldSettlement
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Decision
from tidegate.doors.exceeded import RateLimitExceeded
from tidegate.errors import TidegateError
from tidegate.gate.holds import checked_ttl_s, settled_cost
from tidegate.timestamps import US_PER_S

logger = logging.getLogger(__name__)

_ENDING: Final[set[asyncio.Task[None]]] = set()
"""Settlements of tasks that were cancelled."""
Opened: TypeAlias = tuple[Decision, HoldHandle | None]


class _Hold:
    """What both kinds have in common.

    Attributes:
        decision: on the reservation; None before it was made.
        cost: units reserved.
        settlement: what was charged at the end; None before, and where the store did not answer.
    """

    __slots__ = ("_handle", "_scope", "_used", "cost", "decision", "settlement")

    def __init__(self, scope: str, cost: int) -> None:
        self.decision: Decision | None = None
        self.cost = cost
        self.settlement: HoldSettlement | None = None
        self._scope = scope
        self._handle: HoldHandle | None = None
        self._used: int | None = None

    @property
    def id(self) -> str | None:
        """The id for `POST /v1/holds/{id}/settle`; None before the reservation was made."""
        return None if self._handle is None else self._handle.text

    def settle(self, cost: int) -> None:
        """Set what was used: it is charged when the context ends, also above the limits. The last call counts.

        Args:
            cost: units, 0 to 1,000,000,000.

        Raises:
            BadRequest: if the cost is no such number.
        """
        # A cost up to the reservation needs no further look.
        self._used = cost if type(cost) is int and 0 <= cost <= self.cost else settled_cost(cost)

    def cancel(self) -> None:
        """Charge nothing."""
        self.settle(0)

    def _accept(self, opened: Opened) -> None:
        self.decision, self._handle = opened
        if not self.decision.allowed:
            raise RateLimitExceeded(self.decision, scope=self._scope)

    def _used_at(self, failed: bool) -> int:
        if self._used is not None:
            return self._used
        return 0 if failed else self.cost

    def _failed(self, error: TidegateError) -> None:
        logger.warning("hold not settled, its units come back when it expires: %s", error)


class AsyncHold(_Hold):
    """A hold of a `Limiter`, for `async with`.

    Args:
        scope: name of the limiter.
        cost: units to reserve.
        counters: it is charged to.
        ttl_us: after how many µs it expires.
        store: that keeps it.
        in_memory: the same where it never waits for anything, else None.
        allowed: what is decided instead of the store, in tests; None for nothing.
    """

    __slots__ = ("_allowed", "_counters", "_in_memory", "_store", "_ttl_us")

    def __init__(
        self,
        scope: str,
        cost: int,
        counters: Counters,
        ttl_us: int,
        store: HoldingCounterStore,
        in_memory: MemoryCounters | None = None,
        allowed: Decision | None = None,
    ) -> None:
        # Not by `super`: this is the hot path.
        self.decision = None
        self.cost = cost
        self.settlement = None
        self._scope = scope
        self._handle = None
        self._used = None
        self._counters = counters
        self._ttl_us = ttl_us
        self._store = store
        self._in_memory = in_memory
        self._allowed = allowed

    async def renew(self, ttl_s: int) -> None:
        """Let the hold expire later.

        Args:
            ttl_s: after how many seconds from now, 1 to 3600.

        Raises:
            BadRequest: if the time is out of range.
            HoldEnded: if it has expired.
            StoreUnavailable: if the store does not answer.
        """
        ttl_us = checked_ttl_s(ttl_s) * US_PER_S
        if self._handle is not None and self._handle.counted:
            await self._store.renew_hold(self._handle, ttl_us)

    async def __aenter__(self) -> Self:
        if self._allowed is not None:
            self.decision = self._allowed
            return self
        memory = self._in_memory
        if memory is not None:
            decision, self._handle = memory.open_hold_now(self._counters, self.cost, self._ttl_us, self._scope)
        else:
            decision, self._handle = await self._store.open_hold(self._counters, self.cost, self._ttl_us, self._scope)
        self.decision = decision
        if not decision.allowed:
            raise RateLimitExceeded(decision, scope=self._scope)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        handle = self._handle
        if handle is None or not handle.counted:
            return
        used = self._used
        if used is None:
            used = self._used_at(kind is not None)
        if self._in_memory is not None:
            try:
                self.settlement = self._in_memory.settle_hold_now(handle, used)
            except TidegateError as error:
                self._failed(error)
            return
        try:
            await self._end(handle, used)
        except asyncio.CancelledError:
            # It must not cancel the settlement: that is sent again, which is safe. A task for each would cost more than the rest.
            task = asyncio.ensure_future(self._end(handle, used))
            _ENDING.add(task)
            task.add_done_callback(_ENDING.discard)
            raise

    async def _end(self, handle: HoldHandle, used: int) -> None:
        try:
            self.settlement = await self._store.settle_hold(handle, used)
        except TidegateError as error:
            self._failed(error)


class SyncHold(_Hold):
    """A hold of a `SyncLimiter`, for `with`.

    Args:
        scope: name of the limiter.
        cost: units to reserve.
        opens: makes the reservation.
        settles: ends it.
        renews: lets it expire later.
    """

    __slots__ = ("_opens", "_renews", "_settles")

    def __init__(
        self,
        scope: str,
        cost: int,
        opens: Callable[[], Opened],
        settles: Callable[[HoldHandle, int], HoldSettlement],
        renews: Callable[[HoldHandle, int], None],
    ) -> None:
        super().__init__(scope, cost)
        self._opens = opens
        self._settles = settles
        self._renews = renews

    def renew(self, ttl_s: int) -> None:
        """See `AsyncHold.renew`."""
        ttl_us = checked_ttl_s(ttl_s) * US_PER_S
        if self._handle is not None and self._handle.counted:
            self._renews(self._handle, ttl_us)

    def __enter__(self) -> Self:
        self._accept(self._opens())
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        handle = self._handle
        if handle is None or not handle.counted:
            return
        try:
            self.settlement = self._settles(handle, self._used_at(kind is not None))
        except TidegateError as error:
            self._failed(error)
