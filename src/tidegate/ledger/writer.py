"""Writes what was counted every few seconds, in batches that are applied once, and maintains the tables."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Any, Final

from tidegate.background import SUPERVISOR, stop
from tidegate.catalog.sql.database import Database
from tidegate.errors import CatalogUnavailable
from tidegate.jitter import JITTER
from tidegate.ledger.aggregate import UsageCounts
from tidegate.ledger.buffer import Batch, Buffer
from tidegate.ledger.maintenance import Retention, maintain_tables
from tidegate.ledger.storage import write_batch
from tidegate.timestamps import now_us

logger = logging.getLogger(__name__)

FLUSH_S: Final = 1.5
"""Time limit of the last write when the process ends: less than the shutdown time of a worker."""

_MAINTENANCE_INTERVAL_S: Final = 3600.0
_MAINTENANCE_RETRY_S: Final = 60.0
_RETRY_S: Final = 0.1
_CANCEL_S: Final = 0.2
_JITTER: Final = 0.1


class UsageWriter:
    """Writes `UsageCounts` to the ledger and the traffic history. For use in one event loop.

    While the database fails, counts are added up in a `Buffer`, and the batch that failed is kept and repeated: it is applied
    once, whether its first answer was lost or the database rejected it.

    Args:
        flush_s: write interval, s, varied by ±10 % so that instances do not write at the same time.
        retention: how long rows are kept, and how many callers of an hour.

    Attributes:
        counts: what is counted.
        instance: id of this process in `ledger_batches`, new for each.
        written: units written to the ledger.
        repeated: batches that an earlier attempt had applied.
        lost: units that were lost with this process, when it ended while the database was unavailable.
        failing: whether the last write failed.
    """

    def __init__(
        self,
        counts: UsageCounts,
        database: Database,
        flush_s: float = 5.0,
        retention: Retention | None = None,
    ) -> None:
        self.instance = secrets.token_hex(16)
        self.written = 0
        self.repeated = 0
        self.lost = 0
        self.failing = False
        self.counts = counts
        self._database = database
        self._flush_s = flush_s
        self._retention = retention or Retention()
        self._buffer = Buffer(self._retention.max_callers)
        self._batch: Batch | None = None
        self._reason = ""
        self._writing: asyncio.Task[None] | None = None
        self._maintaining: asyncio.Task[bool] | None = None

    @property
    def pending(self) -> int:
        """Number of rows not written yet."""
        batch = self._batch
        return (0 if batch is None else len(batch)) + len(self._buffer) + len(self.counts)

    @property
    def unattributed(self) -> int:
        """Units in the ledger without their customer and API key, because too many waited to be written."""
        return self.counts.unattributed + self._buffer.unattributed

    @property
    def dropped(self) -> int:
        """Rows of the traffic history dropped because too many waited to be written."""
        return self._buffer.dropped

    async def ping(self) -> None:
        """For `/health`.

        Raises:
            CatalogUnavailable: if the last write failed, with the reason.
        """
        if self.failing:
            raise CatalogUnavailable(f"usage and traffic are not written, they wait in memory: {self._reason}")

    async def run(self) -> None:
        """Write, and maintain the tables, until cancelled. A running operation continues until `flush` ends it."""
        maintenance = SUPERVISOR.start("ledger_retention", self._maintain_periodically)
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
        await self._buffer.add(self.counts.take())
        self.lost += self._buffer.units + (0 if self._batch is None else self._batch.units)
        if self.lost:
            logger.warning("%d units of usage are not confirmed by the database and may be lost with this process", self.lost)

    async def _maintain_periodically(self) -> None:
        failing = False
        while True:
            self._maintaining = asyncio.create_task(self._maintain(failing))
            failing = await asyncio.shield(self._maintaining)
            await asyncio.sleep(_jittered(_MAINTENANCE_RETRY_S if failing else _MAINTENANCE_INTERVAL_S))

    async def _maintain(self, failing: bool) -> bool:
        """Run `maintain_tables`; returns whether it failed."""
        try:
            await maintain_tables(self._database, self._retention)
        except Exception as error:  # noqa: BLE001 - any error of a driver: writing must continue
            if not failing:
                logger.warning("maintenance of the usage ledger and the traffic history failed, retrying every minute: %s", error)
            return True
        return False

    def _write_once(self) -> asyncio.Task[None]:
        """The write in progress, or a new one: there are never two."""
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
            self._writing.add_done_callback(self._ended)
        return self._writing

    def _ended(self, _: asyncio.Task[None]) -> None:
        self._writing = None

    async def _write(self) -> None:
        await self._buffer.add(self.counts.take(), self.counts.take_latency(), now_us())
        while self._batch is not None or len(self._buffer):
            if self._batch is None:
                self._batch = self._buffer.next_batch()
            batch = self._batch
            try:
                applied = await write_batch(self._database, self.instance, batch)
            except Exception as error:  # noqa: BLE001 - any error of a driver: writing must continue
                self._failed(error)
                return
            self._batch = None
            self.written += batch.units
            self.repeated += not applied
            if self.failing:
                self.failing = False
                logger.info("writing usage and traffic works again, nothing was lost")

    def _failed(self, error: Exception) -> None:
        self._reason = str(error)
        if not self.failing:
            logger.warning("writing usage and traffic failed, they wait in memory and would be lost with this process: %s", error)
        self.failing = True


def _jittered(seconds: float) -> float:
    return seconds * JITTER.uniform(1 - _JITTER, 1 + _JITTER)
