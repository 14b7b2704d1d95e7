"""Coroutines that are resumed by what they await, without a task.

With a task, each check that waits for Redis costs twice as much: it is made, scheduled, and woken through the event loop. A
continuation is called by the future itself. It cannot be cancelled, and its coroutine must not ask for the current task, as
`asyncio.timeout` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import copy_context
from typing import Any


class Continuation:
    """Runs a coroutine to its end, in a context of its own.

    Args:
        running: not started; it handles its exceptions.
        loop: the running event loop.
    """

    __slots__ = ("_context", "_loop", "_running")

    def __init__(self, running: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> None:
        self._running = running
        self._loop = loop
        self._context = copy_context()

    def start(self) -> None:
        """Run it until it first waits for something."""
        self._context.run(self._step)

    def _step(self, _: asyncio.Future[Any] | None = None) -> None:
        try:
            awaited = self._running.send(None)
        except StopIteration:
            return
        if awaited is None:
            # `asyncio.sleep(0)`
            self._loop.call_soon(self._step, context=self._context)
        else:
            # A future says by this flag that it is awaited, not yielded by mistake; whoever takes it clears the flag.
            awaited._asyncio_future_blocking = False
            awaited.add_done_callback(self._step, context=self._context)
