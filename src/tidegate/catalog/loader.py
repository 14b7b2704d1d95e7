"""Loads of the process cache (L1): one query for all that wait for an entry, and an expired entry while the catalog fails."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from tidegate.catalog.cache_level import CacheLevel, V
from tidegate.errors import CatalogUnavailable

if TYPE_CHECKING:
    from tidegate.catalog.cached import CachedCatalog

logger = logging.getLogger(__name__)

PATIENCE_S: Final = 0.05
"""Maximum wait of a check for the catalog if an expired entry can be served; the query continues in the background."""
RETRY_S: Final = 1.0
"""Pause after a failure of the catalog before expired entries are loaded again, and after a slow answer before checks wait again.
"""


class CacheLoader:
    """Loads entries. A part of `CachedCatalog`, which stores them and knows which are replaced.

    Args:
        cached: of which it is a part.
        stale_if_error_s: how long an expired entry is still served while the catalog fails, s.

    Attributes:
        failing: whether the catalog does not answer.
        followed: whether a follower reports that, who queries the database and no cache.
        misses: entries that were not fresh.
        stale: of these, expired ones that were served.
    """

    def __init__(self, cached: CachedCatalog, stale_if_error_s: float) -> None:
        self.failing = self.followed = False
        self.misses = self.stale = 0
        self._cached = cached
        self._stale_if_error_s = stale_if_error_s
        self._retry_at = self._slow_until = -math.inf

    async def load_through(self, level: CacheLevel[V], name: str, load: Callable[[str], Awaitable[V]]) -> V:
        """An entry that is not fresh: loaded, or an expired one while the catalog fails or is slow.

        Raises:
            CatalogUnavailable: if the catalog fails and no cached entry can be served.
        """
        self.misses += 1
        now = self._cached.now()
        entry = level.entries.get(name) or level.stale.get(name)
        if entry is None or entry[0] + self._stale_if_error_s <= now:
            return await asyncio.shield(self.flight(level, name, load))
        replaced, value = self._cached.stale_value(level, name, entry[1])
        if now >= self._retry_at:
            flight = self.flight(level, name, load)
            try:
                if replaced and not self.failing:
                    return await asyncio.shield(flight)
                if now >= self._slow_until:
                    # Not asyncio.timeout: it needs a task, and the HTTP server calls this outside of one.
                    await asyncio.wait((flight,), timeout=PATIENCE_S)
                    if flight.done():
                        return flight.result()
                    self._slow_until = now + RETRY_S
            except CatalogUnavailable as error:
                logger.debug("serving an expired entry: %s", error)
        self.stale += 1
        return value

    def flight(self, level: CacheLevel[V], name: str, load: Callable[[str], Awaitable[V]]) -> asyncio.Task[V]:
        """One load shared by all concurrent waiters; none of them can cancel it for the others."""
        task = level.flights.get(name)
        # A task of an event loop that has ended never finishes.
        if task is None or task.get_loop() is not asyncio.get_running_loop():
            task = level.flights[name] = asyncio.ensure_future(self._cached.load(level, name, load))

            def finished(done: asyncio.Task[V]) -> None:
                if level.flights.get(name) is done:
                    del level.flights[name]
                # Read here: every waiter may have been cancelled before it failed.
                if not done.cancelled() and isinstance(done.exception(), CatalogUnavailable):
                    self._retry_at = self._cached.now() + RETRY_S
                    self.failing = True
                elif not self.followed:
                    self.failing = False

            task.add_done_callback(finished)
        return task
