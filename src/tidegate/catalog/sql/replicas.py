"""Read replicas of the catalog: used in turn, removed from rotation while they fail or lag, and put back afterwards.

A replica lags by the age of the oldest change that it has not seen. While nothing changes it does not lag, whatever its clocks
and positions say; and one that is cut off from its primary is found as soon as there is something that it misses.

A replica that is slower than it is asked is not a failing one: where all of this process's connections to it stay in use, the
next is asked, and none is left out, for the others would have to bear its load besides.

A replica's answer counts if the primary is known to have had the version that it is of. Where a primary was lost with its last
changes, a replica may show what the one in its place never had, and cannot follow that one.

One event loop; any number of its tasks.
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
from tidegate.catalog.sql.engine import reason_of
from tidegate.catalog.sql.tables import policy_state

logger = logging.getLogger(__name__)

PROBE_S: Final = 1.0
_VERSIONS_KEPT: Final = 10_000


class Replica:
    """One replica, and whether it is in rotation.

    Attributes:
        out: why it is out of rotation; None while it is in rotation.
        version: of the catalog that it had seen at the last look.
        shown: the latest that it has shown since, in any answer.
        lag_s: age of the oldest change that it had not seen at the last look, s; 0 for none.
        ejections: how often it was removed from rotation.
        free: one for each connection that is not in use.
    """

    def __init__(self, name: str, engine: AsyncEngine, connections: int) -> None:
        self.name = name
        self.engine = engine
        self.free = asyncio.Semaphore(connections)
        self.out: str | None = "not probed yet"
        self.version = 0
        self.shown = 0
        self.lag_s = 0.0
        self.ejections = 0

    def eject(self, why: str) -> None:
        """Remove it from rotation until a probe succeeds."""
        if self.out is None:
            self.ejections += 1
            logger.warning("replica %s removed from rotation: %s", self.name, why, extra={"ecs": {"tidegate.replica": self.name}})
        self.out = why

    def restore(self) -> None:
        """Put it back into rotation."""
        if self.out is not None:
            logger.info("replica %s back in rotation", self.name, extra={"ecs": {"tidegate.replica": self.name}})
        self.out = None


class Replicas:
    """The replicas of one database.

    Args:
        max_lag_s: a replica that lags more is removed from rotation, s.
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
        # Versions of the primary → the time at which each was first seen here; the latest ones. Not a dict: finding its first
        # entry takes longer the more entries were removed from its front.
        self._versions: OrderedDict[int, float] = OrderedDict()
        self._newest = 0
        self._primary_answers = False
        self._asked: set[asyncio.Task[Any]] = set()
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Probe all replicas, and go on probing until `close`."""
        await self.probe()
        self._watching = SUPERVISOR.start("replica_probe", self._watch)

    async def rows(
        self, query: Select[Any], min_version: int, parameters: Mapping[str, Any] | None = None, *, include_ejected: bool = False
    ) -> Sequence[RowMapping] | None:
        """Ask one replica after the other.

        Args:
            query: its first row says as `read_version` which version the rows are of; it gives at least one row.
            min_version: the version that they must have seen.
            include_ejected: ask those that are left out too, and take any version: there is nobody else.

        Returns:
            The rows; None where no replica gives such.
        """
        asked = [replica for replica in self.replicas if replica.out is None or include_ejected]
        self._turn += 1
        in_turn = [asked[(self._turn + place) % len(asked)] for place in range(len(asked))]
        patience_s = self._timeout_s
        for replica in sorted(in_turn, key=lambda replica: (replica.free.locked(), replica.out is not None)):
            try:
                rows = await self._ask(replica, query, parameters, patience_s)
            except _Busy:
                patience_s = 0  # one is waited for; the others were no less busy
                continue
            except (SQLAlchemyError, OSError, TimeoutError) as error:
                replica.eject(reason_of(error))
                continue
            if rows:
                replica.shown = max(replica.shown, rows[0]["read_version"])
            if not rows or rows[0]["read_version"] < min_version:
                continue
            if include_ejected or not self._primary_answers or rows[0]["read_version"] in self._versions:
                return rows
        return None

    def changed(self, *versions: int) -> None:
        """Note what the primary says.

        Args:
            versions: that it had, and last the one that it has.
        """
        self._primary_answers = True
        if versions[-1] < self._newest:
            # Another database took the primary's place, and knows less: what is counted begins anew.
            self._versions.clear()
        self._newest = versions[-1]
        for version in versions:
            self._versions.setdefault(version, self._clock())
        while len(self._versions) > _VERSIONS_KEPT:
            self._versions.popitem(last=False)

    def made(self, version: int) -> None:
        """Note a version that was made here; of a later one may have been heard before."""
        if version > self._newest:
            self.changed(version)
        else:
            self._versions.setdefault(version, self._clock())

    async def probe(self) -> None:
        """Probe every replica and the primary once."""
        await asyncio.gather(*(self._probe_replica(replica) for replica in self.replicas))
        # After them: now it has all that they have, or never had it.
        await self._probe_primary()
        for replica in self.replicas:
            # One that had no connection free for the look tells by its answers how far it is.
            replica.lag_s = self._lag_s(replica.shown)
            if replica.out is None and replica.lag_s > self._max_lag_s:
                replica.eject(f"it lags by {replica.lag_s:.1f} s, more than {self._max_lag_s:g} s")
            if replica.out is None and self._is_ahead(replica):
                replica.eject(f"it has version {replica.version}, which the primary does not have: it follows another primary")

    async def close(self) -> None:
        """Stop probing and close all connections."""
        await stop(self._watching)
        await asyncio.gather(*self._asked, return_exceptions=True)
        for replica in self.replicas:
            await replica.engine.dispose()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(PROBE_S)
            await self.probe()

    async def _probe_primary(self) -> None:
        try:
            self.changed(await self._within(self._primary_version()))
        except Exception as error:  # noqa: BLE001 - whatever it is: while the primary is away, what was seen last holds
            self._primary_answers = False
            logger.debug("the version of the primary cannot be read: %s", error)

    async def _probe_replica(self, replica: Replica) -> None:
        try:
            rows = await self._ask(replica, select(policy_state.c.version.label("read_version")), None, self._timeout_s)
        except _Busy:
            return
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            replica.eject(reason_of(error))
            return
        replica.version = replica.shown = rows[0]["read_version"] if rows else 0
        if not rows:
            replica.eject("it has no catalog")
        elif self._lag_s(replica.version) <= self._max_lag_s and not self._is_ahead(replica):
            replica.restore()

    def _is_ahead(self, replica: Replica) -> bool:
        return self._primary_answers and replica.version > self._newest

    def _lag_s(self, version: int) -> float:
        missed = min((at for each, at in self._versions.items() if each > version), default=None)
        return 0.0 if missed is None else self._clock() - missed

    async def _ask(
        self, replica: Replica, query: Select[Any], parameters: Mapping[str, Any] | None, patience_s: float
    ) -> Sequence[RowMapping]:
        """The rows, or `_Busy` where no connection to it was free for so long."""
        if replica.free.locked():
            try:
                await asyncio.wait_for(replica.free.acquire(), patience_s)
            except TimeoutError as error:
                raise _Busy from error
        else:
            await replica.free.acquire()
        rows: Sequence[RowMapping] = await self._within(_rows(replica, query, parameters))
        return rows

    async def _within(self, asked: Awaitable[Any]) -> Any:
        """Wait for an answer, but not for a driver that gives up slowly: it is left to end by itself."""
        task = asyncio.ensure_future(asked)
        self._asked.add(task)
        task.add_done_callback(self._ended)
        done, _ = await asyncio.wait({task}, timeout=self._timeout_s)
        if done:
            return task.result()
        raise TimeoutError(f"no answer within {self._timeout_s:g} s")

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._asked.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as seen


class _Busy(Exception):
    """All connections of this process to a replica are in use."""


async def _rows(replica: Replica, query: Select[Any], parameters: Mapping[str, Any] | None) -> Sequence[RowMapping]:
    """Ask on a connection that is free, and free it, however late."""
    try:
        async with replica.engine.connect() as connection:
            rows: Sequence[RowMapping] = (await connection.execute(query, parameters)).mappings().all()
    finally:
        replica.free.release()
    return rows
