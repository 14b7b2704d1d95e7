"""Following the catalog's changes: what others change is in force here within a second.

A change is announced on a channel: Redis where instances share one, else PostgreSQL's own (NOTIFY). An announcement says only
that there is something to read; what was touched is read from the database, from the version on that was seen last. So nothing is
lost with a message: the same is asked whenever the channel comes back, and every 0.8 s while it is quiet. Where there is no
channel, or it is down, or was a moment ago (others may still be without it, and unable to announce), the database is asked every
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
"""So often the database is asked although the channel is up: for changes made by whoever could not announce them, which are to be
in force within a second too. The query reads one row of an index."""
SETTLE_S: Final = 5.0
"""So long after the channel came up it is not relied on: by then all others have it again too."""


class Channel(Protocol):
    """Where changes are announced."""

    @property
    def connected(self) -> bool:
        """Whether announcements come through now."""
        ...

    async def announce(self, version: int) -> None:
        """Tell all who listen that there is a new version; does not raise, for they find out all the same."""
        ...

    async def listen(self, heard: Callable[[], None]) -> None:
        """Listen until cancelled, and come back whenever the connection is lost.

        Args:
            heard: is called at each announcement, and each time that listening begins or is lost.
        """
        ...


class CatalogFollower:
    """Keeps a cache in step with its catalog.

    Args:
        poll_s: how often to ask where no announcements come, s.
        channel: where changes are announced; None where there is no such place.

    Attributes:
        failing: whether the catalog did not answer when it was asked last.
    """

    def __init__(self, catalog: Catalog, cached: CachedCatalog, poll_s: float, channel: Channel | None = None) -> None:
        self.failing = False
        self._catalog = catalog
        self._cached = cached
        self._poll_s = poll_s
        self._channel = channel
        self._heard = asyncio.Event()
        self._quiet_from = 0.0

    async def run(self) -> None:
        """Follow until cancelled."""
        channel = self._channel
        listening = (
            None
            if channel is None
            # Polling goes on while it is restarted, so a failure there costs half a second, not a change.
            else SUPERVISOR.start("catalog_announcements", lambda: channel.listen(self._heard.set))
        )
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._heard.wait(), self._pause_s)
                self._heard.clear()
                await self.poll()
        finally:
            await stop(listening)

    async def poll(self) -> bool:
        """Take in what changed.

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
