"""Announcements to all instances that share a Redis: published on one channel, heard on a connection of its own.

In a cluster what is published on any node is heard on all, so any node will do for listening.
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
ASK_S: Final = 1.0
"""So often a connection that listens is asked whether it still lives: a frozen server is as silent as a quiet one."""


class RedisChannel:
    """One channel of a Redis.

    Args:
        store: of this process.
        name: of the channel.
    """

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
        """Tell all who listen.

        Args:
            version: what to tell them.
        """
        try:
            await self._store.start()
            await self._store.call(self._name.encode(), "PUBLISH", self._name, str(version))
        except StoreUnavailable as error:
            logger.warning("version %d could not be announced on Redis; instances find out within seconds: %s", version, error)

    async def listen(self, heard: Callable[[], None]) -> None:
        """Listen until cancelled.

        Args:
            heard: is called at each announcement, and each time that listening begins or is lost.
        """

        def pushed(push: list[Any]) -> None:
            if push[0] == b"subscribe":
                # The connection counts as up once it has read this: `changed` is called then.
                self._subscribed = True
            elif push[0] == b"message":
                heard()

        def changed(connection: Connection) -> None:
            if not connection.up:
                self._subscribed = False
            heard()

        await self._store.start()
        connection = self._connection = self._store.listening(self._name, pushed, changed)
        try:
            while True:
                await asyncio.sleep(ASK_S)
                if connection.up:
                    try:
                        await connection.ask(encode_command("PING"))
                    except StoreUnavailable as error:
                        # One late answer says little; the connection itself sees to it that it is not owed for long.
                        logger.debug("the channel's connection: %s", error)
        finally:
            self._connection = None
            self._subscribed = False
            await connection.close()
