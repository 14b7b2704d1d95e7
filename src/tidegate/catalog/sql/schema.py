"""Upgrades a database's schema to this version, or downgrades it.

Any number of processes may start at once on one database: one of them upgrades it, the others wait. A migration only adds while
older versions of Tidegate may run (expand); what they need is removed later, by a migration that raises `runs_from` (contract).
So an older version works with a newer schema, unless its `runs_from` excludes that version.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Final, TypeVar

import msgspec
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from tidegate.catalog.sql.database_errors import FOREIGN_REMEDY, is_transient, remedy_of, sqlstate_of
from tidegate.catalog.sql.engine import is_postgres, make_private, open_engine, reason_of, redacted_url
from tidegate.catalog.sql.tables import metadata
from tidegate.errors import SettingsError

logger = logging.getLogger(__name__)

LOCK: Final = 0x7469_6465_6761_7465
"""Id of the advisory lock for schema changes on PostgreSQL: "tidegate" in ASCII."""
PATIENCE_S: Final = 600.0
"""Maximum wait for the schema change of another process, and for one statement of our own."""
_UPGRADE_ATTEMPTS: Final = 25
_PAUSE_S: Final = 0.2
_LOCK_TIMEOUT_S: Final = 5
# Alembic keeps its state in globals, and a process may have several event loops: so not an asyncio lock.
_alembic_mutex: Final = threading.Lock()
_Result = TypeVar("_Result")


class SchemaState(msgspec.Struct, frozen=True):
    """The current schema of a database.

    Args:
        revision: None if the database has none yet.
        usable: whether this version works with it without an upgrade.
    """

    revision: str | None
    head: str
    usable: bool


class _Busy(Exception):
    """Another process is changing the schema."""


async def upgrade_schema(url: str, engine: AsyncEngine) -> str:
    """Upgrade the schema to this version, if it is older.

    Returns:
        The revision: that of this version, or a newer one that this version works with.

    Raises:
        SettingsError: if the database cannot be opened or written, or is too new for this version.
    """
    return await _inspect(url, engine, _usable) or await change_schema(url, engine, functools.partial(_upgrade, url=url))


async def inspect_schema(url: str, engine: AsyncEngine) -> SchemaState:
    """Read the state of the schema without changing anything.

    Raises:
        SettingsError: if the database cannot be opened, is too new for this version, or holds tables of another program.
    """
    return await _inspect(url, engine, _schema_state)


async def upgrade(url: str) -> str:
    """`upgrade_schema` for a database that is not open.

    Raises:
        SettingsError: if it fails, with the reason.
    """
    engine = open_engine(url)
    try:
        return await upgrade_schema(url, engine)
    finally:
        await engine.dispose()


async def downgrade(url: str, revision: str) -> str:
    """Downgrade the schema. Tables and columns that later migrations added are dropped with their data.

    Args:
        revision: target, e.g. `0002`.

    Raises:
        SettingsError: if the revision does not exist or is newer than the current one, or the database cannot be opened.
    """

    def restore(connection: Connection) -> str:
        config = migration_config(connection)
        known = [each.revision for each in _migrations().walk_revisions()]
        if revision not in known:
            raise SettingsError(f"there is no revision {revision[:20]!r} of the schema: there are {', '.join(sorted(known))}")
        current = MigrationContext.configure(connection).get_current_revision()
        if current is None or (current in known and current < revision):
            at = "empty" if current is None else f"at revision {current}"
            raise SettingsError(
                f"the database {redacted_url(url)} is {at}, which is before {revision}: use 'tidegate db upgrade'"
            )
        if current not in known:
            raise SettingsError(f"the database {redacted_url(url)} was made by a newer Tidegate: downgrade it with that version")
        command.downgrade(config, revision)
        return revision

    engine = open_engine(url)
    try:
        return await change_schema(url, engine, restore)
    finally:
        await engine.dispose()


async def change_schema(url: str, engine: AsyncEngine, change: Callable[[Connection], str]) -> str:
    """Run a change of the schema, exclusively among all processes.

    Args:
        change: run in a transaction; returns the revision.

    Raises:
        SettingsError: if it fails, with the reason.
    """
    if is_postgres(url):
        # With a longer timeout: a migration of a large table takes longer than any query of a check.
        migration_engine = open_engine(url, pool_size=1, timeout_s=PATIENCE_S)
        try:
            return await _run_with_retries(url, migration_engine, _with_advisory_lock(change), round(PATIENCE_S / _PAUSE_S))
        finally:
            await migration_engine.dispose()
    return await _run_with_retries(url, engine, _in_immediate_transaction(change), _UPGRADE_ATTEMPTS)


def migration_config(connection: Connection | None) -> Config:
    """Alembic's configuration for the shipped migrations, on a connection that is in use; None to read them only."""
    config = Config()
    config.set_main_option(
        "script_location", str(resources.files("tidegate.catalog.sql").joinpath("migrations")).replace("%", "%%")
    )
    config.attributes["connection"] = connection
    return config


@functools.cache
def _migrations() -> ScriptDirectory:
    """The shipped migrations, whose modules are loaded once in a process."""
    return ScriptDirectory.from_config(migration_config(None))


def head_revision() -> str:
    """The revision of the schema that this version makes."""
    head = _migrations().get_current_head()
    assert head is not None, "the package ships its migrations"
    return head


def _open_once(engine: AsyncEngine) -> None:
    """Raise SQLite's error for a file that cannot be opened; aiosqlite would raise it from a thread that keeps running."""
    if engine.url.database and engine.url.database != ":memory:":
        (file,), options = engine.dialect.create_connect_args(engine.url)
        if not options.get("uri", False):
            make_private(file)
        sqlite3.connect(file, uri=options.get("uri", False)).close()


async def _inspect(url: str, engine: AsyncEngine, inspection: Callable[[Connection, str], _Result]) -> _Result:
    try:
        if not is_postgres(url):
            _open_once(engine)
    except (sqlite3.Error, OSError) as error:
        raise await _open_error(url, error) from None
    # Retried as well: if two processes switch a new SQLite file to WAL mode, the second fails whatever its busy timeout.
    return await _run_with_retries(url, engine, lambda connection: inspection(connection, url), _UPGRADE_ATTEMPTS)


async def _run_with_retries(url: str, engine: AsyncEngine, work: Callable[[Connection], _Result], max_attempts: int) -> _Result:
    # Two processes may start on one new database: the one whose migration conflicts with the other's tries again.
    for attempt in range(max_attempts):
        try:
            async with _alembic_lock(), engine.begin() as connection:
                return await connection.run_sync(work)
        except _Busy:
            if attempt == 0:
                logger.info("another process is changing the catalog's schema: waiting for it")
        except (OperationalError, DBAPIError) as error:
            if attempt + 1 >= min(max_attempts, _UPGRADE_ATTEMPTS) or not is_transient(error):
                raise await _open_error(url, error) from None
        except CommandError as error:
            raise SettingsError(f"the schema of the database {redacted_url(url)} cannot be changed: {error}") from None
        except (SQLAlchemyError, sqlite3.Error, OSError) as error:
            raise await _open_error(url, error) from None
        await asyncio.sleep(_PAUSE_S)
    raise SettingsError(f"the database {redacted_url(url)}: another process has been changing its schema for {PATIENCE_S:g} s")


@contextlib.asynccontextmanager
async def _alembic_lock() -> AsyncIterator[None]:
    while not _alembic_mutex.acquire(blocking=False):
        await asyncio.sleep(_PAUSE_S / 10)
    try:
        yield
    finally:
        _alembic_mutex.release()


def _with_advisory_lock(change: Callable[[Connection], str]) -> Callable[[Connection], str]:
    def locked(connection: Connection) -> str:
        if not connection.execute(text("SELECT pg_try_advisory_xact_lock(:lock)"), {"lock": LOCK}).scalar_one():
            raise _Busy
        # A statement that waits for a table blocks all later ones: better to fail and retry.
        connection.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT_S}s'"))
        return change(connection)

    return locked


def _in_immediate_transaction(change: Callable[[Connection], str]) -> Callable[[Connection], str]:
    def begun(connection: Connection) -> str:
        # SQLite's driver starts no transaction for DDL: an interrupted migration would stay half applied.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        return change(connection)

    return begun


def _usable(connection: Connection, url: str) -> str | None:
    """The database's revision, if this version works with it; None if it must be upgraded."""
    head = head_revision()
    current = MigrationContext.configure(connection).get_current_revision()
    if current == head:
        return current
    if current is None or current in {each.revision for each in _migrations().walk_revisions()}:
        return None
    try:
        runs_from = connection.execute(text("SELECT runs_from FROM policy_state")).scalar()
    except SQLAlchemyError:
        runs_from = None
    if runs_from is None or runs_from > head:
        raise SettingsError(
            f"the database {redacted_url(url)} was made by a newer Tidegate: run that version, or give another catalog.url"
        )
    logger.info("the catalog's schema is %s, newer than this version's %s, which works with it", current, head)
    return current


def _schema_state(connection: Connection, url: str) -> SchemaState:
    usable = _usable(connection, url) is not None
    current = MigrationContext.configure(connection).get_current_revision()
    _require_free(connection, url, current)
    return SchemaState(current, head_revision(), usable)


def _upgrade(connection: Connection, url: str) -> str:
    # Another process may have upgraded it in the meantime.
    usable = _usable(connection, url)
    if usable is not None:
        return usable
    _require_free(connection, url, MigrationContext.configure(connection).get_current_revision())
    command.upgrade(migration_config(connection), "head")
    return head_revision()


async def _open_error(url: str, error: Exception) -> SettingsError:
    """The error for a database that cannot be opened or changed: its message, and the remedy for its code."""
    remedy = remedy_of(error)
    if remedy is None and is_postgres(url) and sqlstate_of(error) is None:
        from tidegate.catalog.sql.postgres_connection import diagnose_connection

        remedy = await asyncio.to_thread(diagnose_connection, url, redacted_url(url))
    reason = (error.strerror or str(error)) if isinstance(error, OSError) else reason_of(error)
    return SettingsError(_open_message(url, reason, remedy or "see 'tidegate doctor'"))


def _require_free(connection: Connection, url: str, current: str | None) -> None:
    """Reject a database without Tidegate's schema that has tables of the same names."""
    foreign = set(inspect(connection).get_table_names()) & set(metadata.tables) if current is None else set()
    if foreign:
        raise SettingsError(_open_message(url, f"table {min(foreign)} already exists", FOREIGN_REMEDY))


def _open_message(url: str, reason: str, remedy: str) -> str:
    return f"the database {redacted_url(url)} cannot be opened ({reason}): {remedy}"
