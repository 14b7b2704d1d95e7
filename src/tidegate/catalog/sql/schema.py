"""Bringing a database's schema up to this version, or back.

Any number of processes may start at once on one database: one of them does it, the others wait. A step only adds as long as older
versions of Tidegate run (expand); what they need is taken away later, by a step that raises `runs_from` (contract). So an older
version finds a newer schema and works with it, unless that says otherwise.
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

from tidegate.catalog.sql.database_errors import FOREIGN_REMEDY, is_passing, remedy_of, sqlstate_of
from tidegate.catalog.sql.engine import is_postgres, make_private, open_engine, reason_of, shown
from tidegate.catalog.sql.tables import metadata
from tidegate.errors import SettingsError

logger = logging.getLogger(__name__)

LOCK: Final = 0x7469_6465_6761_7465
"""Names the lock of whoever changes the schema of a PostgreSQL: "tidegate" in ASCII."""
PATIENCE_S: Final = 600.0
"""So long another process may take to change the schema, and one statement of ours."""
_UPGRADE_TRIES: Final = 25
_PAUSE_S: Final = 0.2
_LOCK_TIMEOUT_S: Final = 5
# Alembic keeps what it runs on in globals of the process, and a process may have several loops: so no lock of asyncio's.
_alembic: Final = threading.Lock()
_Result = TypeVar("_Result")


class SchemaSeen(msgspec.Struct, frozen=True):
    """The schema of a database, as it is.

    Args:
        revision: None where there is none yet.
        usable: whether this version works with it as it is.
    """

    revision: str | None
    head: str
    usable: bool


class _Busy(Exception):
    """Another process changes the schema now."""


async def upgrade_schema(url: str, engine: AsyncEngine) -> str:
    """Bring the schema up to this version, where it is not.

    Returns:
        The revision: of this version, or a later one that this version works with.

    Raises:
        SettingsError: if the database cannot be opened or written, or is too new for this version.
    """
    return await _look(url, engine, _usable) or await change_schema(url, engine, functools.partial(_upgrade, url=url))


async def look_at_schema(url: str, engine: AsyncEngine) -> SchemaSeen:
    """Find out what `upgrade_schema` would do, and do nothing.

    Raises:
        SettingsError: if the database cannot be opened, is too new for this version, or holds tables of another program.
    """
    return await _look(url, engine, _seen)


async def upgrade(url: str) -> str:
    """`upgrade_schema` for a database that nobody has opened.

    Raises:
        SettingsError: if it cannot be done; it says why.
    """
    engine = open_engine(url)
    try:
        return await upgrade_schema(url, engine)
    finally:
        await engine.dispose()


async def downgrade(url: str, revision: str) -> str:
    """Take the schema back. What a step had added is dropped with all that it holds.

    Args:
        revision: such as `0002`.

    Raises:
        SettingsError: if there is no such revision, or it is not behind this one, or the database cannot be had.
    """

    def restore(connection: Connection) -> str:
        config = migration_config(connection)
        known = [each.revision for each in ScriptDirectory.from_config(config).walk_revisions()]
        if revision not in known:
            raise SettingsError(f"there is no revision {revision[:20]!r} of the schema: there are {', '.join(sorted(known))}")
        current = MigrationContext.configure(connection).get_current_revision()
        if current is None or (current in known and current < revision):
            at = "empty" if current is None else f"at revision {current}"
            raise SettingsError(f"the database {shown(url)} is {at}, which is before {revision}: use 'tidegate db upgrade'")
        if current not in known:
            raise SettingsError(f"the database {shown(url)} was made by a newer Tidegate: take it back with that one")
        command.downgrade(config, revision)
        return revision

    engine = open_engine(url)
    try:
        return await change_schema(url, engine, restore)
    finally:
        await engine.dispose()


async def change_schema(url: str, engine: AsyncEngine, change: Callable[[Connection], str]) -> str:
    """Run a change of the schema, alone among all processes.

    Args:
        change: is run in a transaction; gives the revision.

    Raises:
        SettingsError: if it cannot be done; it says why.
    """
    if is_postgres(url):
        # With patience of its own: a step over a large table takes longer than any answer to a check.
        patient = open_engine(url, pool_size=1, timeout_s=PATIENCE_S)
        try:
            return await _in_turn(url, patient, _alone(change), round(PATIENCE_S / _PAUSE_S))
        finally:
            await patient.dispose()
    return await _in_turn(url, engine, _whole(change), _UPGRADE_TRIES)


def migration_config(connection: Connection) -> Config:
    """Alembic's configuration for the shipped migrations."""
    config = Config()
    config.set_main_option(
        "script_location", str(resources.files("tidegate.catalog.sql").joinpath("migrations")).replace("%", "%%")
    )
    config.attributes["connection"] = connection
    return config


def _open_once(engine: AsyncEngine) -> None:
    """Raise what SQLite says of a file that cannot be opened. Said by aiosqlite, it would come from a thread that outlives us."""
    if engine.url.database and engine.url.database != ":memory:":
        (file,), options = engine.dialect.create_connect_args(engine.url)
        if not options.get("uri", False):
            make_private(file)
        sqlite3.connect(file, uri=options.get("uri", False)).close()


async def _look(url: str, engine: AsyncEngine, look: Callable[[Connection, str], _Result]) -> _Result:
    try:
        if not is_postgres(url):
            _open_once(engine)
    except (sqlite3.Error, OSError) as error:
        raise await _refused(url, error) from None
    # Looking takes turns as well: of two that make one new file of SQLite's a WAL one, the second is refused, however patient.
    return await _in_turn(url, engine, lambda connection: look(connection, url), _UPGRADE_TRIES)


async def _in_turn(url: str, engine: AsyncEngine, work: Callable[[Connection], _Result], tries: int) -> _Result:
    # Two processes may start on one new database: the one that loses a step to the other looks again.
    for attempt in range(tries):
        try:
            async with _alembics_turn(), engine.begin() as connection:
                return await connection.run_sync(work)
        except _Busy:
            if attempt == 0:
                logger.info("another process changes the catalog's schema: waiting for it")
        except (OperationalError, DBAPIError) as error:
            if attempt + 1 >= min(tries, _UPGRADE_TRIES) or not is_passing(error):
                raise await _refused(url, error) from None
        except CommandError as error:
            raise SettingsError(f"the schema of the database {shown(url)} cannot be changed: {error}") from None
        except (SQLAlchemyError, sqlite3.Error, OSError) as error:
            raise await _refused(url, error) from None
        await asyncio.sleep(_PAUSE_S)
    raise SettingsError(f"the database {shown(url)}: another process has been changing its schema for {PATIENCE_S:g} s")


@contextlib.asynccontextmanager
async def _alembics_turn() -> AsyncIterator[None]:
    while not _alembic.acquire(blocking=False):
        await asyncio.sleep(_PAUSE_S / 10)
    try:
        yield
    finally:
        _alembic.release()


def _alone(change: Callable[[Connection], str]) -> Callable[[Connection], str]:
    def locked(connection: Connection) -> str:
        if not connection.execute(text("SELECT pg_try_advisory_xact_lock(:lock)"), {"lock": LOCK}).scalar_one():
            raise _Busy
        # Whoever waits for a table makes all who come later wait as well: better to give up and try again.
        connection.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT_S}s'"))
        return change(connection)

    return locked


def _whole(change: Callable[[Connection], str]) -> Callable[[Connection], str]:
    def begun(connection: Connection) -> str:
        # SQLite's driver begins no transaction for DDL by itself: a step that was stopped half-way would stay so.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        return change(connection)

    return begun


def _usable(connection: Connection, url: str) -> str | None:
    """The database's revision, if this version can work with it as it is; None if it is to be upgraded."""
    config = migration_config(connection)
    script = ScriptDirectory.from_config(config)
    head = script.get_current_head()
    current = MigrationContext.configure(connection).get_current_revision()
    if current == head:
        return current
    if current is None or current in {each.revision for each in script.walk_revisions()}:
        return None
    try:
        runs_from = connection.execute(text("SELECT runs_from FROM policy_state")).scalar()
    except SQLAlchemyError:
        runs_from = None
    if head is None or runs_from is None or runs_from > head:
        raise SettingsError(f"the database {shown(url)} was made by a newer Tidegate: run that one, or give another catalog.url")
    logger.info("the catalog's schema is %s, newer than this version's %s, which works with it", current, head)
    return current


def _seen(connection: Connection, url: str) -> SchemaSeen:
    head = ScriptDirectory.from_config(migration_config(connection)).get_current_head()
    assert head is not None, "the package ships its migrations"
    usable = _usable(connection, url) is not None
    current = MigrationContext.configure(connection).get_current_revision()
    _require_free(connection, url, current)
    return SchemaSeen(current, head, usable)


def _upgrade(connection: Connection, url: str) -> str:
    # Another process may have done it meanwhile.
    usable = _usable(connection, url)
    if usable is not None:
        return usable
    config = migration_config(connection)
    _require_free(connection, url, MigrationContext.configure(connection).get_current_revision())
    command.upgrade(config, "head")
    head = ScriptDirectory.from_config(config).get_current_head()
    assert head is not None, "the package ships its migrations"
    return head


async def _refused(url: str, error: Exception) -> SettingsError:
    """The error of a database that cannot be opened or changed: what it said, and the remedy by its code."""
    remedy = remedy_of(error)
    if remedy is None and is_postgres(url) and sqlstate_of(error) is None:
        from tidegate.catalog.sql.postgres_connection import why_unreachable

        remedy = await asyncio.to_thread(why_unreachable, url, shown(url))
    reason = (error.strerror or str(error)) if isinstance(error, OSError) else reason_of(error)
    return SettingsError(_why(url, reason, remedy or "see 'tidegate doctor'"))


def _require_free(connection: Connection, url: str, current: str | None) -> None:
    """Refuse a database without our schema that has tables of our names."""
    foreign = set(inspect(connection).get_table_names()) & set(metadata.tables) if current is None else set()
    if foreign:
        raise SettingsError(_why(url, f"table {min(foreign)} already exists", FOREIGN_REMEDY))


def _why(url: str, reason: str, remedy: str) -> str:
    return f"the database {shown(url)} cannot be opened ({reason}): {remedy}"
