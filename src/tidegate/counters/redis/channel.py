"""Announcements to all instances that share a Redis: published on one channel, received on a connection of its own.

A cluster delivers what is published on one node to all nodes, so any node can be subscribed to.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from tidegate.counters.redis.connection import Connection
from tidegate.counters.redis.resp import encode_command
from tidegate.counters.redis.store import RedisCounters
from tidegate.errors import StoreUnavailable

logger = logging.getLogger(__name__)

CATALOG: Final = "tg:catalog"
PING_INTERVAL_S: Final = 1.0
"""Interval between pings on a subscribed connection, s: without them a hung server looks like a quiet one."""


class RedisChannel:
    """One channel of a Redis."""

    def __init__(self, store: RedisCounters, name: str = CATALOG) -> None:
        self._store = store
        self._name = name
        self._connection: Connection | None = None
        self._subscribed = False

    @property
    def connected(self) -> bool:
        """Whether announcements come through now."""
        return self._subscribed and self._connection is not None and self._connection.up

    async def announce(self, version: int) -> None:
        """Announce a catalog version to all instances."""
        try:
            await self._store.start()
            await self._store.call(self._name.encode(), "PUBLISH", self._name, str(version))
        except StoreUnavailable as error:
            logger.warning("catalog version %d not announced on Redis, instances poll for it within seconds: %s", version, error)

    async def listen(self, on_announcement: Callable[[], None]) -> None:
        """Receive announcements until cancelled.

        Args:
            on_announcement: called at each announcement, and each time the subscription begins or is lost.
        """

        def pushed(push: list[Any]) -> None:
            if push[0] == b"subscribe":
                # The connection counts as up once it has read this: `changed` is called then.
                self._subscribed = True
            elif push[0] == b"message":
                on_announcement()

        def changed(connection: Connection) -> None:
            if not connection.up:
                self._subscribed = False
            on_announcement()

        await self._store.start()
        connection = self._connection = self._store.subscribe(self._name, pushed, changed)
        try:
            while True:
                await asyncio.sleep(PING_INTERVAL_S)
                if connection.up:
                    try:
                        await connection.send(encode_command("PING"))
                    except StoreUnavailable as error:
                        # One late reply is not a failure; the connection itself drops a server whose replies stay overdue.
                        logger.debug("the channel's connection: %s", error)
        finally:
            self._connection = None
            self._subscribed = False
            await connection.close()
