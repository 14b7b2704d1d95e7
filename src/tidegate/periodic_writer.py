"""Writes what a process counted to the database: every few seconds, at its end, and in the background.

Checks never wait for it. A write that runs is never interrupted, except at the end of the process.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from typing import Any, Final

from tidegate.background import SUPERVISOR, stop
from tidegate.jitter import JITTER

logger = logging.getLogger(__name__)

FLUSH_S: Final = 1.5
"""Time limit of the last write when the process ends: less than the shutdown time of a worker."""
MAINTENANCE_INTERVAL_S: Final = 3600.0
MAINTENANCE_RETRY_S: Final = 60.0

_RETRY_S: Final = 0.1
_CANCEL_S: Final = 0.2
_JITTER: Final = 0.1


class PeriodicWriter(ABC):
    """A writer for use in one event loop; subclasses have the counts and the statements.

    Args:
        flush_s: write interval, s, varied by ±10 % so that instances do not write at the same time.
        maintenance: name of the task that maintains the tables.
        tables: what the log calls them.

    Attributes:
        failing: whether the last write failed.
    """

    def __init__(self, flush_s: float, maintenance: str, tables: str) -> None:
        self.failing = False
        self._flush_s = flush_s
        self._maintenance = maintenance
        self._tables = tables
        self._writing: asyncio.Task[None] | None = None
        self._maintaining: asyncio.Task[bool] | None = None

    @property
    @abstractmethod
    def pending(self) -> int:
        """Number of rows not written yet."""

    @abstractmethod
    async def _write(self) -> None:
        """Write all that is pending; sets `failing`, and raises nothing."""

    @abstractmethod
    async def _maintain(self) -> None:
        """Maintain the tables; raises whatever the database does."""

    @abstractmethod
    async def _give_up(self) -> None:
        """Count what was not written in time as lost."""

    async def run(self) -> None:
        """Write, and maintain the tables, until cancelled. A running operation continues until `flush` ends it."""
        maintenance = SUPERVISOR.start(self._maintenance, self._maintain_periodically)
        try:
            while True:
                await asyncio.sleep(_jittered(self._flush_s))
                # Cancelling this must neither interrupt a transaction nor wait for a frozen server.
                await asyncio.shield(self._write_once())
        finally:
            await stop(maintenance)

    async def flush(self, within_s: float = FLUSH_S) -> None:
        """Write everything, at the end of the process. What is not written in time is lost, and counted as such.

        Args:
            within_s: time limit, s, plus 0.2 s if the database does not respond to cancellation.
        """
        now = asyncio.get_running_loop().time
        deadline = now() + within_s
        running: set[asyncio.Task[Any]] = set() if self._maintaining is None else {self._maintaining}
        while (self.pending or self._writing is not None) and now() < deadline:
            task = self._write_once()
            done, _ = await asyncio.wait({task}, timeout=deadline - now())
            if not done:
                running.add(task)
            elif self.failing:
                await asyncio.sleep(min(_RETRY_S, max(deadline - now(), 0)))
        for task in running:
            task.cancel()
        if running:
            # With a timeout: a driver may wait for a frozen server before it gives up.
            await asyncio.wait(running, timeout=_CANCEL_S)
        await self._give_up()

    def _write_once(self) -> asyncio.Task[None]:
        """The write in progress, or a new one: there are never two."""
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
            self._writing.add_done_callback(self._ended)
        return self._writing

    def _ended(self, _: asyncio.Task[None]) -> None:
        self._writing = None

    async def _maintain_periodically(self) -> None:
        failing = False
        while True:
            self._maintaining = asyncio.create_task(self._maintain_once(failing))
            failing = await asyncio.shield(self._maintaining)
            await asyncio.sleep(_jittered(MAINTENANCE_RETRY_S if failing else MAINTENANCE_INTERVAL_S))

    async def _maintain_once(self, failing: bool) -> bool:
        """Maintain the tables; returns whether that failed."""
        try:
            await self._maintain()
        except Exception as error:  # noqa: BLE001 - any error of a driver: writing must continue
            if not failing:
                logger.warning("maintenance of %s failed, retrying every minute: %s", self._tables, error)
            return True
        return False


def _jittered(seconds: float) -> float:
    return seconds * JITTER.uniform(1 - _JITTER, 1 + _JITTER)
