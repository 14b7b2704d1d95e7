"""The database of the catalog: one that is written to, and any number of replicas that are read from.

Every change is one transaction that first takes the row of `policy_state`: writers of all processes go one after the other, and
each raises the version by which the others find out. Versions are ms since the epoch, or one more than the last where that is
later: so a number that was lost with a failed primary is not given again by the one that takes its place.

A check reads from a replica where there is one that has seen what it must have seen, else from the primary. Operators read from
the primary, and so what they wrote.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec
from sqlalchemy import RowMapping, Select, case, func, select, text, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import QueuePool, StaticPool

from tidegate.catalog.sql.change_log import WriteTransaction, no_state
from tidegate.catalog.sql.database_errors import READ_ONLY, cannot_write, is_transient, sqlstate_of
from tidegate.catalog.sql.engine import (
    BUSY_TIMEOUT_MS,
    checked_out,
    is_postgres,
    open_engine,
    read_rows,
    reason_of,
    redacted_url,
    sqlite_reader,
)
from tidegate.catalog.sql.replicas import Replica, Replicas
from tidegate.catalog.sql.schema import upgrade_schema
from tidegate.catalog.sql.tables import policy_state
from tidegate.errors import CatalogUnavailable, SettingsError
from tidegate.timestamps import now_us

logger = logging.getLogger(__name__)

CHANNEL: Final = "tidegate_catalog"
"""Where PostgreSQL announces changes (NOTIFY)."""
_CLOSE_S: Final = 1.0
"""How long `close` waits for connections in use."""
WRITE_TIMEOUT_S: Final = 15.0
"""Writers wait for the write lock, so an answer may take longer than for readers."""
_WRITERS: Final = 4
WRITE_PROBE_S: Final = 10.0
"""Minimum interval between probe writes of `/health` to a SQLite file that is not written otherwise."""
_CAN_WRITE: Final = text(
    "SELECT pg_is_in_recovery() AS standby, current_setting('default_transaction_read_only') AS read_only FROM policy_state"
)

_Write = TypeVar("_Write", bound=WriteTransaction)


class DatabaseOptions(msgspec.Struct, frozen=True):
    """How a database is used.

    Args:
        pool_size: maximum number of read connections per server; another 4 are for writes.
        timeout_s: time limit of an answer, s.
        max_replica_lag_s: lag at which a replica is removed from rotation, s.
    """

    replicas: tuple[str, ...] = ()
    pool_size: int = 8
    timeout_s: float = 2.0
    max_replica_lag_s: float = 5.0


class Database:
    """Connections to the catalog's database and its replicas. Create it with `open`.

    Args:
        reader: connections for reads from the primary.
        writer: connections for writes to it; for SQLite the same engine.

    Attributes:
        announce: callback run with the new version after each change; must not raise. PostgreSQL also announces it (NOTIFY).
    """

    def __init__(self, name: str, reader: AsyncEngine, writer: AsyncEngine) -> None:
        self.name = name
        self.announce: Callable[[int], Awaitable[None]] | None = None
        self.replicas: Replicas | None = None
        self.queries = 0
        self._write_fault: str | None = None
        self._written_at_s = time.monotonic()
        self._reader = reader
        self._writer = writer
        self._sqlite = sqlite_reader(reader)

    @classmethod
    async def open(cls, url: str, options: DatabaseOptions | None = None) -> Database:
        """Connect, and upgrade the schema to this version.

        Raises:
            SettingsError: if the database cannot be opened, with the reason.
        """
        options = options or DatabaseOptions()
        if options.replicas and not is_postgres(url):
            raise SettingsError(
                "catalog.replicas is set, but catalog.url is not a PostgreSQL URL: remove catalog.replicas, or use PostgreSQL"
            )
        reader = open_engine(url, reads_only=True, pool_size=options.pool_size, timeout_s=options.timeout_s)
        writer = reader
        replicas = []
        if is_postgres(url):
            writer = open_engine(url, pool_size=_WRITERS, timeout_s=WRITE_TIMEOUT_S)
            for each in options.replicas:
                engine = open_engine(
                    each,
                    setting="catalog.replicas",
                    writes=False,
                    reads_only=True,
                    pool_size=options.pool_size,
                    timeout_s=options.timeout_s,
                )
                replicas.append(Replica(redacted_url(each), engine, options.pool_size))
        database = cls(redacted_url(url), reader, writer)
        try:
            await upgrade_schema(url, writer)
            if replicas:
                database.replicas = Replicas(replicas, options.timeout_s, options.max_replica_lag_s, database.version)
                await database.replicas.start()
        except BaseException:
            await database.close()
            raise
        return database

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._writer.dialect.name

    @property
    def connections(self) -> dict[str, int]:
        """Read connections to the primary by state: `in_use`, `idle`."""
        pool = self._reader.pool
        in_use, idle = (pool.checkedout(), pool.checkedin()) if isinstance(pool, QueuePool) else (0, 0)
        if self._sqlite is not None:
            in_use, idle = map(sum, zip((in_use, idle), self._sqlite.connections, strict=True))
        return {"in_use": in_use, "idle": idle}

    @property
    def _in_memory(self) -> bool:
        # One shared connection: a commit of the probe would commit the transactions of others.
        return isinstance(self._writer.pool, StaticPool)

    async def read(
        self, query: Select[Any], min_version: int, parameters: Mapping[str, Any] | None = None
    ) -> Sequence[RowMapping]:
        """Run a query for a check and return its rows.

        Args:
            query: its first row has the version that was read as `read_version`; it returns at least one row.
            min_version: minimum version of the rows of a replica.

        Returns:
            The rows of a replica that has this version, else of the primary. If the primary does not answer either, those of a
            replica that was removed from rotation, if it has this version.

        Raises:
            CatalogUnavailable: if no database answers.
        """
        self.queries += 1
        if self.replicas is not None:
            replicated = await self.replicas.rows(query, min_version, parameters)
            if replicated is not None:
                return replicated
        try:
            rows = await self._read_primary(query, parameters)
        except CatalogUnavailable:
            replicated = None
            if self.replicas is not None:
                replicated = await self.replicas.rows(query, min_version, parameters, include_ejected=True)
            if replicated is None:
                raise
            return replicated
        if not rows:
            raise no_state()
        return rows

    async def _read_primary(self, query: Select[Any], parameters: Mapping[str, Any] | None) -> Sequence[RowMapping]:
        try:
            if self._sqlite is None:
                return await read_rows(self._reader, query, parameters)
            return await self._sqlite.rows(query, parameters)
        except (SQLAlchemyError, OSError) as error:
            raise _not_answering(error) from error

    async def version(self) -> int:
        """The version of the catalog on the primary.

        Raises:
            CatalogUnavailable: if it does not answer.
        """
        async with self.reading() as connection:
            version = (await connection.execute(select(policy_state.c.version))).scalar()
        if version is None:
            raise no_state()
        return int(version)

    async def ping(self) -> None:
        """Check that the primary answers and is writable.

        Raises:
            CatalogUnavailable: if it is not, with the reason.
        """
        if self.dialect == "postgresql":
            async with self.reading() as connection:
                row = (await connection.execute(_CAN_WRITE)).one()
            if row.standby or row.read_only == "on":
                raise CatalogUnavailable(f"the catalog's database {self.name} is not writable: it is read-only or a standby")
        else:
            await self.version()
        # Only a write reveals a full disk: a probe write runs after a failed write, and periodically for SQLite.
        due = self._write_fault is not None or time.monotonic() - self._written_at_s >= WRITE_PROBE_S
        if due and not self._in_memory and (self.dialect == "sqlite" or self._write_fault is not None):
            await self._probe_writing()
        if self._write_fault is not None:
            raise CatalogUnavailable(f"the catalog's database {self.name} is not writable: {self._write_fault}")

    async def _probe_writing(self) -> None:
        lock_timeout = "PRAGMA busy_timeout = 100" if self.dialect == "sqlite" else "SET LOCAL lock_timeout = '100ms'"
        try:
            async with self._writer.connect() as connection:
                try:
                    await connection.exec_driver_sql(lock_timeout)
                    # Changed by 1 µs: SQLite writes nothing if no value changes.
                    await connection.execute(update(policy_state).values(changed_at_us=policy_state.c.changed_at_us + 1))
                    await connection.commit()
                finally:
                    if self.dialect == "sqlite":
                        await connection.rollback()
                        await connection.exec_driver_sql(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        except (SQLAlchemyError, OSError) as error:
            if is_transient(error):
                return  # another process is writing now, and records whether that succeeds
            self._note_write(error)
            if not cannot_write(error):
                raise CatalogUnavailable(f"the catalog's database {self.name} is not writable: {reason_of(error)}") from error
        else:
            self._note_write(None)

    def _note_write(self, error: Exception | None) -> None:
        """Record whether the database was writable at the last write; errors of single statements do not count."""
        if error is None:
            self._write_fault = None
            self._written_at_s = time.monotonic()
        elif cannot_write(error):
            self._write_fault = reason_of(error)

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A connection to read from the primary.

        Raises:
            CatalogUnavailable: if the database does not answer.
        """
        try:
            async with self._reader.connect() as connection:
                yield connection
        except (SQLAlchemyError, OSError) as error:
            raise _not_answering(error) from error

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that changes nothing that checks read; it does not change the version.

        Raises:
            CatalogUnavailable: if the database rejects it.
        """
        try:
            async with self._writer.begin() as connection:
                yield connection
            self._note_write(None)
        except (SQLAlchemyError, OSError) as error:
            self._note_write(error)
            raise CatalogUnavailable(f"the catalog's database rejected the change: {reason_of(error)}") from error

    def changing(self) -> contextlib.AbstractAsyncContextManager[WriteTransaction]:
        """See `changing_as`."""
        return self.changing_as(WriteTransaction)

    @contextlib.asynccontextmanager
    async def changing_as(self, make: Callable[[AsyncConnection, int, int], _Write]) -> AsyncIterator[_Write]:
        """A transaction that raises the version. It locks the row of `policy_state` first, which serializes all writers.

        Yields:
            The transaction; at the end it is logged, committed and announced.

        Raises:
            CatalogUnavailable: if the database rejects it.
        """
        try:
            connection, writing = await self._acquire_write_lock(make)
            try:
                yield writing
                await writing.log()
                if self.dialect == "postgresql":
                    await connection.execute(select(func.pg_notify(CHANNEL, str(writing.version))))
                await connection.commit()
                self._note_write(None)
            finally:
                await connection.close()
        except (SQLAlchemyError, OSError) as error:
            self._note_write(error)
            raise CatalogUnavailable(f"the catalog's database rejected the change: {reason_of(error)}") from error
        if self.replicas is not None:
            self.replicas.add_version(writing.version)
        if self.announce is not None:
            await self.announce(writing.version)

    async def close(self) -> None:
        """Close all connections, after a bounded wait for what is being read, such as a reload in the background."""
        if self.replicas is not None:
            await self.replicas.close()
        if self._sqlite is not None:
            await self._sqlite.close()
        # A connection in use is not closed by `dispose`: it would be left to the garbage collector where its loop ends first.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                while any(checked_out(engine) for engine in (self._reader, self._writer)):
                    await asyncio.sleep(0.005)
        await self._reader.dispose()
        if self._writer is not self._reader:
            await self._writer.dispose()

    async def _acquire_write_lock(self, make: Callable[[AsyncConnection, int, int], _Write]) -> tuple[AsyncConnection, _Write]:
        """A connection in a transaction that has the write lock."""
        at_us = now_us()
        state = policy_state.c
        now_ms = at_us // 1000
        later = case((state.version >= now_ms, state.version + 1), else_=now_ms)
        raised = (
            update(policy_state)
            .values(version=later, previous=state.version, changed_at_us=at_us)
            .returning(state.version, state.previous)
        )
        for attempt in (1, 2):
            connection = await self._writer.connect()
            try:
                state_row = (await connection.execute(raised)).first()
                if state_row is None:
                    raise no_state()
            except DBAPIError as error:
                await connection.close()
                if attempt == 2 or sqlstate_of(error) != READ_ONLY:
                    raise
                # The former primary is a standby now: its connections can neither write nor read what was written.
                logger.info("the catalog's primary has become a standby; looking for the new one")
                await self._writer.dispose()
                await self._reader.dispose()
            except BaseException:
                await connection.close()
                raise
            else:
                return connection, make(connection, state_row.version, state_row.previous)
        raise AssertionError("the second attempt raises or returns")


def _not_answering(error: Exception) -> CatalogUnavailable:
    return CatalogUnavailable(f"the catalog's database does not answer: {reason_of(error)}")
