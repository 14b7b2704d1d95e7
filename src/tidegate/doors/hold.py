"""Holds of `Limiter` and `SyncLimiter`: context managers that reserve a cost, and charge what was used when they end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Final, Self, TypeAlias

from tidegate.counters.holds import HoldHandle, HoldSettlement
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
        self._used = settled_cost(cost)

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
        opens: makes the reservation.
        settles: ends it.
        renews: lets it expire later.
        settles_now: ends it without waiting for anything; None where the store cannot.
    """

    def __init__(
        self,
        scope: str,
        cost: int,
        opens: Callable[[], Awaitable[Opened]],
        settles: Callable[[HoldHandle, int], Awaitable[HoldSettlement]],
        renews: Callable[[HoldHandle, int], Awaitable[None]],
        settles_now: Callable[[HoldHandle, int], HoldSettlement] | None = None,
    ) -> None:
        super().__init__(scope, cost)
        self._settles_now = settles_now
        self._opens = opens
        self._settles = settles
        self._renews = renews

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
            await self._renews(self._handle, ttl_us)

    async def __aenter__(self) -> Self:
        self._accept(await self._opens())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        handle = self._handle
        if handle is None or not handle.counted:
            return
        used = self._used_at(kind is not None)
        if self._settles_now is not None:
            try:
                self.settlement = self._settles_now(handle, used)
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
            self.settlement = await self._settles(handle, used)
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
