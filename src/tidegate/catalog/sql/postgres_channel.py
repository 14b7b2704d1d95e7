"""PostgreSQL's LISTEN/NOTIFY as a channel: for instances that share no Redis."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from tidegate.catalog.sql.database import CHANNEL
from tidegate.catalog.sql.engine import postgres_creator
from tidegate.jitter import JITTER

logger = logging.getLogger(__name__)

PROBE_S: Final = 2.0
"""A connection without notifications for this long is probed."""
_PAUSE_S: Final = 0.5


class PostgresChannel:
    """A dedicated connection that listens.

    Args:
        url: of the catalog.
        timeout_s: time limit of an answer, s.

    Raises:
        SettingsError: if libpq does not understand the URL, or psycopg is not installed.
    """

    def __init__(self, url: str, timeout_s: float = 2.0) -> None:
        # Longer than the wait for notifications, so that the deadline of an answer does not end the listening.
        self._connect = postgres_creator(url, "catalog.url", writes=True, timeout_s=PROBE_S + timeout_s)
        self._connected = False

    @property
    def connected(self) -> bool:
        """See `Channel.connected`."""
        return self._connected

    async def announce(self, version: int) -> None:
        """See `Channel.announce`: the change's own transaction has announced it."""

    async def listen(self, on_announcement: Callable[[], None]) -> None:
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
                    on_announcement()
                    await self._receive(connection, on_announcement)
                finally:
                    self._connected = False
                    on_announcement()
                    await connection.close()
            except (psycopg.Error, OSError) as error:
                if not failing:
                    logger.warning("PostgreSQL's announcements are lost, the catalog is polled meanwhile: %s", _first_line(error))
                failing = True
            # With jitter, so that many instances do not reconnect at once.
            await asyncio.sleep(_PAUSE_S * JITTER.uniform(0.5, 1.5))

    async def _receive(self, connection: Any, on_announcement: Callable[[], None]) -> None:
        while True:
            async for _ in connection.notifies(timeout=PROBE_S, stop_after=1):
                on_announcement()
            # A frozen or unreachable server sends nothing either, and neither does a demoted one.
            row = await (await connection.execute("SELECT pg_is_in_recovery()")).fetchone()
            if row[0]:
                raise OSError("the server has become a standby")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
