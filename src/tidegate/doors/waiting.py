"""Waiting for a limit. Where the store gives reservations, each caller takes its place in the queue with one call and
goes at its moment. Where not, one caller of a subject at a time checks: the others of this process wait for their turn.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Generic, TypeVar

from tidegate.counters.reservations import Reservation
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.retry_pause import checked_wait_s, retry_pause_s

logger = logging.getLogger(__name__)

_TIMER_S: Final = 0.001
"""Timers of event loops are rounded to so much: no caller may go before its moment."""
_GIVE_BACK_S: Final = 2.0
"""How long a cancelled caller waits until its reservation is cancelled too, s; that goes on afterwards."""

_L = TypeVar("_L", asyncio.Lock, threading.Lock)


class _Turns(Generic[_L]):
    """A lock for each subject that somebody waits for."""

    def __init__(self, make: Callable[[], _L]) -> None:
        self._make: Callable[[], _L] = make
        self._guard = threading.Lock()
        self._locks: dict[str, tuple[_L, int]] = {}

    def __len__(self) -> int:
        """Subjects that somebody waits for."""
        return len(self._locks)

    def join(self, subject: str) -> _L:
        with self._guard:
            lock, waiting = self._locks.get(subject) or (self._make(), 0)
            self._locks[subject] = (lock, waiting + 1)
        return lock

    def leave(self, subject: str) -> None:
        with self._guard:
            lock, waiting = self._locks.pop(subject)
            if waiting > 1:
                self._locks[subject] = (lock, waiting - 1)


class AsyncWaiting:
    """Waits on an event loop; callers of one subject pass in the order in which they came."""

    def __init__(self) -> None:
        self.turns: _Turns[asyncio.Lock] = _Turns(asyncio.Lock)
        self._returning: set[asyncio.Task[None]] = set()

    async def wait_reserved(
        self,
        reserve: Callable[[float], Coroutine[Any, Any, Reservation]],
        release: Callable[[Reservation], Awaitable[bool]],
        at_most_s: float,
    ) -> Decision:
        """Reserve and wait for the moment: one call of the store where there is a place in time.

        Args:
            reserve: takes how far ahead the moment may be, s.
            release: cancels a reservation, when the caller is cancelled while it waits.
            at_most_s: how long to wait, s, 0 or more.

        Returns:
            The decision of the reservation; a denial, at once, if there is no place in time.
        """
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + checked_wait_s(at_most_s)
        while True:
            reserving = asyncio.ensure_future(reserve(max(give_up_at - loop.time(), 0)))
            try:
                place = await asyncio.shield(reserving)
                if place.wait_s:
                    await asyncio.sleep(place.wait_s + _TIMER_S)
            except asyncio.CancelledError:
                await self._give_back(reserving, release)
                raise
            pause_s = None if place.allowed else retry_pause_s(place.decision.retry_after, give_up_at - loop.time())
            if pause_s is None:
                return place.decision
            await asyncio.sleep(pause_s)

    async def _give_back(self, reserving: asyncio.Future[Reservation], release: Callable[[Reservation], Awaitable[bool]]) -> None:
        async def cancel() -> None:
            try:
                place = await reserving
                if place.wait_s:
                    await release(place)
            except StoreUnavailable as error:
                logger.info("reservation not cancelled, its units stay charged: %s", error)

        task = asyncio.ensure_future(cancel())
        self._returning.add(task)
        task.add_done_callback(self._returning.discard)
        await asyncio.wait((task,), timeout=_GIVE_BACK_S)

    async def wait(self, check: Callable[[], Awaitable[Decision]], subject: str, at_most_s: float) -> Decision:
        """Check until it passes or cannot pass in time.

        Args:
            check: decides and charges.
            subject: whose turn it is.
            at_most_s: how long to wait, s, 0 or more.

        Returns:
            The last decision. Nothing is charged unless it is allowed, also where the caller is cancelled while it waits.
        """
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + checked_wait_s(at_most_s)
        lock = self.turns.join(subject)
        try:
            try:
                async with asyncio.timeout_at(give_up_at):
                    await lock.acquire()
            except TimeoutError:
                return await check()
            try:
                while True:
                    decision = await check()
                    pause_s = None if decision.allowed else retry_pause_s(decision.retry_after, give_up_at - loop.time())
                    if pause_s is None:
                        return decision
                    await asyncio.sleep(pause_s)
            finally:
                lock.release()
        finally:
            self.turns.leave(subject)


class BlockingWaiting:
    """Waits in threads; which of those that wait for one subject is next, the system decides."""

    def __init__(self) -> None:
        self.turns: _Turns[threading.Lock] = _Turns(threading.Lock)

    def wait_reserved(
        self, reserve: Callable[[float], Reservation], release: Callable[[Reservation], bool], at_most_s: float
    ) -> Decision:
        """See `AsyncWaiting.wait_reserved`; an exception that a signal raises cancels the reservation."""
        give_up_at = time.monotonic() + checked_wait_s(at_most_s)
        while True:
            place = reserve(max(give_up_at - time.monotonic(), 0))
            if place.wait_s:
                self._sleep_until(place, release)
            pause_s = None if place.allowed else retry_pause_s(place.decision.retry_after, give_up_at - time.monotonic())
            if pause_s is None:
                return place.decision
            time.sleep(pause_s)

    @staticmethod
    def _sleep_until(place: Reservation, release: Callable[[Reservation], bool]) -> None:
        try:
            time.sleep(min(place.wait_s, threading.TIMEOUT_MAX))
        except BaseException:
            try:
                release(place)
            except StoreUnavailable as error:
                logger.info("reservation not cancelled, its units stay charged: %s", error)
            raise

    def wait(self, check: Callable[[], Decision], subject: str, at_most_s: float) -> Decision:
        """See `AsyncWaiting.wait`."""
        give_up_at = time.monotonic() + min(checked_wait_s(at_most_s), threading.TIMEOUT_MAX)
        lock = self.turns.join(subject)
        try:
            if not lock.acquire(timeout=max(give_up_at - time.monotonic(), 0)):
                return check()
            try:
                while True:
                    decision = check()
                    pause_s = None if decision.allowed else retry_pause_s(decision.retry_after, give_up_at - time.monotonic())
                    if pause_s is None:
                        return decision
                    time.sleep(pause_s)
            finally:
                lock.release()
        finally:
            self.turns.leave(subject)
