"""PostgreSQL's own announcements, NOTIFY, as a channel: for instances that share no Redis."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any, Final

from tidegate.catalog.sql.database import CHANNEL
from tidegate.catalog.sql.engine import postgres_creator

logger = logging.getLogger(__name__)

ASK_S: Final = 2.0
"""A connection that was silent for so long is asked whether it still lives."""
_PAUSE_S: Final = 0.5


class PostgresChannel:
    """A connection of its own that listens.

    Args:
        url: of the catalog.
        timeout_s: how long an answer may take, s.

    Raises:
        SettingsError: if libpq does not understand the URL, or psycopg is not installed.
    """

    def __init__(self, url: str, timeout_s: float = 2.0) -> None:
        # Beyond the silence that is waited for, so that the deadline of an answer does not end the listening.
        self._connect = postgres_creator(url, "catalog.url", writes=True, timeout_s=ASK_S + timeout_s)
        self._connected = False

    @property
    def connected(self) -> bool:
        """See `Channel.connected`."""
        return self._connected

    async def announce(self, version: int) -> None:
        """See `Channel.announce`: the change's own transaction has announced it."""

    async def listen(self, heard: Callable[[], None]) -> None:
        """See `Channel.listen`."""
        import psycopg

        failing = False
        while True:
            try:
                connection = await self._connect()
                try:
                    await connection.set_autocommit(True)
                    await connection.execute(f"LISTEN {CHANNEL}")
                    self._connected = True
                    if failing:
                        logger.info("listening to PostgreSQL again")
                    failing = False
                    heard()
                    await self._hear(connection, heard)
                finally:
                    self._connected = False
                    heard()
                    await connection.close()
            except (psycopg.Error, OSError) as error:
                if not failing:
                    logger.warning("PostgreSQL's announcements are lost, the catalog is polled meanwhile: %s", _first_line(error))
                failing = True
            # Jittered, so that many instances do not come back at once.
            await asyncio.sleep(_PAUSE_S * random.uniform(0.5, 1.5))

    async def _hear(self, connection: Any, heard: Callable[[], None]) -> None:
        while True:
            async for _ in connection.notifies(timeout=ASK_S, stop_after=1):
                heard()
            # A server that is frozen or cut off says nothing either; and one that was demoted announces nothing.
            row = await (await connection.execute("SELECT pg_is_in_recovery()")).fetchone()
            if row[0]:
                raise OSError("the server has become a standby")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
