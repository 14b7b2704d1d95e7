"""Read replicas of the catalog: used round robin, removed from rotation while they fail or lag, and restored afterwards.

The lag of a replica is the age of the oldest change that it has not applied. Without changes there is no lag, whatever its clocks
and WAL positions are; a replica that is disconnected from its primary is detected as soon as it misses a change.

An overloaded replica is not a failing one: while all of this process's connections to it are in use, the next replica is queried.
It stays in rotation, because otherwise the others would have to take its load as well.

The answer of a replica is used only if the primary is known to have had its version. If a primary was lost with its last changes,
a replica may contain changes that the new primary never had, and cannot replicate from it.

For use in one event loop, by any number of tasks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import RowMapping, Select, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from tidegate.background import SUPERVISOR, stop
from tidegate.catalog.sql.engine import read_rows, reason_of
from tidegate.catalog.sql.tables import policy_state

logger = logging.getLogger(__name__)

PROBE_S: Final = 1.0
_VERSIONS_KEPT: Final = 10_000


class Replica:
    """One replica, and whether it is in rotation.

    Attributes:
        ejected_because: why it is out of rotation; None while it is in rotation.
        version: version of the catalog at the last probe.
        latest_version: version of its latest answer to any query.
        lag_s: age of the oldest change that it had not applied at the last probe, s; 0 for none.
        ejections: how often it was removed from rotation.
        free: a semaphore with one slot for each unused connection.
    """

    def __init__(self, name: str, engine: AsyncEngine, connections: int) -> None:
        self.name = name
        self.engine = engine
        self.free = asyncio.Semaphore(connections)
        self.ejected_because: str | None = "not probed yet"
        self.version = 0
        self.latest_version = 0
        self.lag_s = 0.0
        self.ejections = 0

    def eject(self, why: str) -> None:
        """Remove it from rotation until a probe succeeds."""
        if self.ejected_because is None:
            self.ejections += 1
            logger.warning("replica %s removed from rotation: %s", self.name, why, extra={"ecs": {"tidegate.replica": self.name}})
        self.ejected_because = why

    def restore(self) -> None:
        """Put it back into rotation."""
        if self.ejected_because is not None:
            logger.info("replica %s back in rotation", self.name, extra={"ecs": {"tidegate.replica": self.name}})
        self.ejected_because = None


class Replicas:
    """The replicas of one database.

    Args:
        max_lag_s: lag at which a replica is removed from rotation, s.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        timeout_s: float,
        max_lag_s: float,
        primary_version: Callable[[], Awaitable[int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.replicas = tuple(replicas)
        self._timeout_s = timeout_s
        self._max_lag_s = max_lag_s
        self._primary_version = primary_version
        self._clock = clock
        self._turn = 0
        # Versions of the primary → the time at which each was first read; the latest ones. Not a dict: finding its first
        # entry takes longer the more entries were removed from its front.
        self._versions: OrderedDict[int, float] = OrderedDict()
        self._newest = 0
        self._primary_answers = False
        self._pending: set[asyncio.Task[Any]] = set()
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Probe all replicas, then periodically until `close`."""
        await self.probe()
        self._watching = SUPERVISOR.start("replica_probe", self._watch)

    async def rows(
        self, query: Select[Any], min_version: int, parameters: Mapping[str, Any] | None = None, *, include_ejected: bool = False
    ) -> Sequence[RowMapping] | None:
        """Query one replica after another until one has an answer.

        Args:
            query: its first row has the version that was read as `read_version`; it returns at least one row.
            min_version: minimum version of the rows.
            include_ejected: query replicas out of rotation too, and accept any version, because no other database answers.

        Returns:
            The rows; None if no replica returned any.
        """
        candidates = [replica for replica in self.replicas if replica.ejected_because is None or include_ejected]
        self._turn += 1
        in_turn = [candidates[(self._turn + offset) % len(candidates)] for offset in range(len(candidates))]
        wait_s = self._timeout_s
        for replica in sorted(in_turn, key=lambda replica: (replica.free.locked(), replica.ejected_because is not None)):
            try:
                rows = await self._query(replica, query, parameters, wait_s)
            except _Busy:
                wait_s = 0  # waited for one; the others were just as busy
                continue
            except (SQLAlchemyError, OSError, TimeoutError) as error:
                replica.eject(reason_of(error))
                continue
            if rows:
                replica.latest_version = max(replica.latest_version, rows[0]["read_version"])
            if not rows or rows[0]["read_version"] < min_version:
                continue
            if include_ejected or not self._primary_answers or rows[0]["read_version"] in self._versions:
                return rows
        return None

    def changed(self, *versions: int) -> None:
        """Record versions of the primary.

        Args:
            versions: versions that it had, and at the end its current one.
        """
        self._primary_answers = True
        if versions[-1] < self._newest:
            # A failover to a database with an older version: start again with its versions.
            self._versions.clear()
        self._newest = versions[-1]
        for version in versions:
            self._versions.setdefault(version, self._clock())
        while len(self._versions) > _VERSIONS_KEPT:
            self._versions.popitem(last=False)

    def add_version(self, version: int) -> None:
        """Record the version of a write of this process; a later version may have been recorded before."""
        if version > self._newest:
            self.changed(version)
        else:
            self._versions.setdefault(version, self._clock())

    async def probe(self) -> None:
        """Probe every replica and the primary once."""
        await asyncio.gather(*(self._probe_replica(replica) for replica in self.replicas))
        # After the replicas: a version that they have is on the primary by now, or never was.
        await self._probe_primary()
        for replica in self.replicas:
            # A replica without a free connection for the probe: the version of its answers is used.
            replica.lag_s = self._lag_s(replica.latest_version)
            if replica.ejected_because is None and replica.lag_s > self._max_lag_s:
                replica.eject(f"it lags by {replica.lag_s:.1f} s, more than {self._max_lag_s:g} s")
            if replica.ejected_because is None and self._is_ahead(replica):
                replica.eject(f"it has version {replica.version}, which the primary does not have: it follows another primary")

    async def close(self) -> None:
        """Stop probing and close all connections."""
        await stop(self._watching)
        await asyncio.gather(*self._pending, return_exceptions=True)
        for replica in self.replicas:
            await replica.engine.dispose()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(PROBE_S)
            await self.probe()

    async def _probe_primary(self) -> None:
        try:
            self.changed(await self._within(self._primary_version()))
        except Exception as error:  # noqa: BLE001 - any error: while the primary fails, its last known versions are used
            self._primary_answers = False
            logger.debug("the version of the primary cannot be read: %s", error)

    async def _probe_replica(self, replica: Replica) -> None:
        try:
            rows = await self._query(replica, select(policy_state.c.version.label("read_version")), None, self._timeout_s)
        except _Busy:
            return
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            replica.eject(reason_of(error))
            return
        replica.version = replica.latest_version = rows[0]["read_version"] if rows else 0
        if not rows:
            replica.eject("it has no catalog")
        elif self._lag_s(replica.version) <= self._max_lag_s and not self._is_ahead(replica):
            replica.restore()

    def _is_ahead(self, replica: Replica) -> bool:
        return self._primary_answers and replica.version > self._newest

    def _lag_s(self, version: int) -> float:
        missed = min((at for each, at in self._versions.items() if each > version), default=None)
        return 0.0 if missed is None else self._clock() - missed

    async def _query(
        self, replica: Replica, query: Select[Any], parameters: Mapping[str, Any] | None, wait_s: float
    ) -> Sequence[RowMapping]:
        """The rows; raises `_Busy` if no connection became free in time."""
        if replica.free.locked():
            try:
                await asyncio.wait_for(replica.free.acquire(), wait_s)
            except TimeoutError as error:
                raise _Busy from error
        else:
            await replica.free.acquire()
        rows: Sequence[RowMapping] = await self._within(_rows(replica, query, parameters))
        return rows

    async def _within(self, answer: Awaitable[Any]) -> Any:
        """Wait for an answer up to the timeout; a driver that is slow to give up continues in the background."""
        task = asyncio.ensure_future(answer)
        self._pending.add(task)
        task.add_done_callback(self._on_done)
        done, _ = await asyncio.wait({task}, timeout=self._timeout_s)
        if done:
            return task.result()
        raise TimeoutError(f"no answer within {self._timeout_s:g} s")

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._pending.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as retrieved


class _Busy(Exception):
    """All connections of this process to a replica are in use."""


async def _rows(replica: Replica, query: Select[Any], parameters: Mapping[str, Any] | None) -> Sequence[RowMapping]:
    """Run the query on a free connection, and release its slot even if the answer is late."""
    try:
        return await read_rows(replica.engine, query, parameters)
    finally:
        replica.free.release()
