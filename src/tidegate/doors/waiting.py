"""Waiting for a limit, one caller of a subject at a time: the others of this process wait for their turn and ask no store."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from tidegate.decision import Decision
from tidegate.retry_pause import checked_wait_s, retry_pause_s

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
