"""Writes what was counted every few seconds, in batches that are applied once, and maintains the tables."""

from __future__ import annotations

import logging
import secrets

from tidegate.catalog.sql.database import Database
from tidegate.errors import CatalogUnavailable
from tidegate.ledger.aggregate import UsageCounts
from tidegate.ledger.buffer import Batch, Buffer
from tidegate.ledger.maintenance import Retention, maintain_tables
from tidegate.ledger.storage import write_batch
from tidegate.periodic_writer import PeriodicWriter
from tidegate.timestamps import now_us

logger = logging.getLogger(__name__)


class UsageWriter(PeriodicWriter):
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
        super().__init__(flush_s, "ledger_retention", "the usage ledger and the traffic history")
        self.instance = secrets.token_hex(16)
        self.written = 0
        self.repeated = 0
        self.lost = 0
        self.counts = counts
        self._database = database
        self._retention = retention or Retention()
        self._buffer = Buffer(self._retention.max_callers)
        self._batch: Batch | None = None
        self._reason = ""

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

    async def _give_up(self) -> None:
        await self._buffer.add(self.counts.take())
        self.lost += self._buffer.units + (0 if self._batch is None else self._batch.units)
        if self.lost:
            logger.warning("%d units of usage are not confirmed by the database and may be lost with this process", self.lost)

    async def _maintain(self) -> None:
        await maintain_tables(self._database, self._retention)

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
