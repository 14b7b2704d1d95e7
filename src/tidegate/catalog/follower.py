"""Follows the catalog's changes: a change made by another instance is active here within a second.

A change is announced on a channel: Redis where instances share one, else PostgreSQL's own (NOTIFY). An announcement means only
that there is something to read; what was touched is read from the database, starting at the last version read. So a lost message
loses no change: the same query runs whenever the channel reconnects, and every 0.8 s without announcements. Without a channel,
while it is down, and for `SETTLE_S` after it reconnects (others may still be unable to announce), the database is polled every
`poll_s`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final, Protocol

from tidegate.background import SUPERVISOR, stop
from tidegate.catalog import Catalog
from tidegate.catalog.cached import CachedCatalog
from tidegate.errors import TidegateError

logger = logging.getLogger(__name__)

QUIET_POLL_S: Final = 0.8
"""Poll interval while the channel is connected: for changes whose author could not announce them, which must be active within a
second too. The query reads one row of an index."""
SETTLE_S: Final = 5.0
"""Time after a reconnect of the channel before it is relied on: by then all other instances have reconnected too."""


class Channel(Protocol):
    """Where changes are announced."""

    @property
    def connected(self) -> bool:
        """Whether announcements are received now."""
        ...

    async def announce(self, version: int) -> None:
        """Announce a new version to all listeners; does not raise, because they also poll."""
        ...

    async def listen(self, on_announcement: Callable[[], None]) -> None:
        """Listen until cancelled; reconnect whenever the connection is lost.

        Args:
            on_announcement: called for each announcement, and each time listening starts or the connection is lost.
        """
        ...


class CatalogFollower:
    """Keeps a cache in sync with its catalog.

    Args:
        poll_s: poll interval without announcements, s.
        channel: where changes are announced; None if there is none.

    Attributes:
        failing: whether the catalog did not answer the last poll.
    """

    def __init__(self, catalog: Catalog, cached: CachedCatalog, poll_s: float, channel: Channel | None = None) -> None:
        self.failing = False
        self._catalog = catalog
        self._cached = cached
        self._poll_s = poll_s
        self._channel = channel
        self._announced = asyncio.Event()
        self._quiet_from = 0.0

    async def run(self) -> None:
        """Follow until cancelled."""
        channel = self._channel
        listening = (
            None
            if channel is None
            # Polling continues while it is restarted, so a failure delays a change by half a second and loses none.
            else SUPERVISOR.start("catalog_announcements", lambda: channel.listen(self._announced.set))
        )
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._announced.wait(), self._pause_s)
                self._announced.clear()
                await self.poll()
        finally:
            await stop(listening)

    async def poll(self) -> bool:
        """Read new changes and apply them to the cache.

        Returns:
            Whether the catalog answered.
        """
        try:
            changes = await self._catalog.changes(self._cached.version)
        except TidegateError as error:
            if not self.failing:
                logger.warning("the catalog does not answer, serving cached entries: %s", error)
            self.failing = True
            self._cached.followed(failing=True)
            return False
        if self.failing:
            logger.info("the catalog is available again")
        self.failing = False
        self._cached.followed(failing=False)
        if changes.version != self._cached.version:
            self._cached.changed(changes)
            logger.info("catalog version %d active", changes.version, extra={"ecs": {"tidegate.policy_version": changes.version}})
        return True

    @property
    def _pause_s(self) -> float:
        now = asyncio.get_running_loop().time()
        if self._channel is None or not self._channel.connected:
            self._quiet_from = now + SETTLE_S
            return self._poll_s
        return self._poll_s if self.failing or now < self._quiet_from else max(QUIET_POLL_S, self._poll_s)
