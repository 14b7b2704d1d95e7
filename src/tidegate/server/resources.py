"""What one instance has opened: closed in reverse order; its background tasks; and what SIGHUP reads again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from tidegate.background import SUPERVISOR, stop
from tidegate.telemetry.health import Health


class Resources:
    """Resources, tasks and reloads of an instance."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self._stack = contextlib.AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._reloads: list[Callable[[], None]] = []
        self._flushes: list[Callable[[], Awaitable[None]]] = []

    def own(self, name: str | None, ping: Callable[[], Awaitable[None]], close: Callable[[], Awaitable[None]]) -> None:
        """Register a resource for `/health` (if it has a name) and for closing."""
        if name is not None:
            self._health.add(name, ping)
        self.on_close(close)

    def on_close(self, close: Callable[[], Awaitable[None]]) -> None:
        """Call this before what was registered earlier is closed."""
        self._stack.push_async_callback(close)

    def flush_at_end(self, flush: Callable[[], Awaitable[None]]) -> None:
        """Write what is buffered before the resources that were opened earlier are closed."""
        if not self._flushes:
            # Opened after the catalog, so flushed before the catalog is closed.
            self.on_close(self._flush)
        self._flushes.append(flush)

    async def _flush(self) -> None:
        # At the same time: while the database does not answer, one after the other would take longer than a worker has to end.
        await asyncio.gather(*(flush() for flush in self._flushes))

    def spawn(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run a supervised task until the resources are closed."""
        self._tasks.append(SUPERVISOR.start(name, work))

    def on_reload(self, again: Callable[[], None]) -> None:
        """Call this on SIGHUP."""
        self._reloads.append(again)

    def reload_event(self) -> asyncio.Event:
        """A new event that SIGHUP sets."""
        event = asyncio.Event()
        self._reloads.append(event.set)
        return event

    def reload(self) -> None:
        """Read everything again that can change while the instance runs."""
        for again in self._reloads:
            again()

    async def stop_tasks(self) -> None:
        """Cancel the tasks and wait for their ends."""
        await stop(*self._tasks)

    async def close(self) -> None:
        """Close the resources in reverse order."""
        await self._stack.aclose()
