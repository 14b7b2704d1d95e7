"""Opening a database and bringing its schema up to this version."""

from __future__ import annotations

import asyncio
import sqlite3
from importlib import resources
from pathlib import Path
from typing import Any, Final

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

from tidegate.errors import SettingsError

_BUSY_TIMEOUT_MS: Final = 5_000
_UPGRADE_TRIES: Final = 25
# Alembic keeps what it runs on in a global of the process.
_upgrading: Final = asyncio.Lock()


def open_engine(url: str) -> AsyncEngine:
    """An engine for a catalog's URL; nothing is connected yet.

    Args:
        url: `sqlite:///relative.db`, `sqlite:////absolute.db`, or `sqlite://` for memory.

    Returns:
        The engine.

    Raises:
        SettingsError: if the URL names no database that this version has.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise SettingsError("catalog.url is no database URL: write 'sqlite:///tidegate.db'") from None
    if parsed.drivername != "sqlite":
        # Only the scheme is repeated: the rest of a database's URL may hold a password.
        raise SettingsError(
            f"catalog.url with the scheme {parsed.drivername!r} is no catalog of this version: use 'sqlite:///tidegate.db'"
        )
    in_memory = parsed.database in (None, "", ":memory:")
    options: dict[str, Any] = {"poolclass": StaticPool} if in_memory else {}
    engine = create_async_engine(parsed.set(drivername="sqlite+aiosqlite"), **options)
    event.listen(engine.sync_engine, "connect", _on_connect)
    return engine


async def upgrade_schema(engine: AsyncEngine) -> str:
    """Bring the schema up to this version.

    Args:
        engine: the database.

    Returns:
        The revision.

    Raises:
        SettingsError: if the database cannot be opened or written, or is newer than this version.
    """
    # Two processes may start on one new file: the one that loses a step to the other looks again.
    for attempt in range(_UPGRADE_TRIES):
        try:
            async with _upgrading, engine.begin() as connection:
                return await connection.run_sync(_upgrade)
        except OperationalError as error:
            reason = str(error.orig)
            if attempt + 1 == _UPGRADE_TRIES or not ("already exists" in reason or "locked" in reason):
                raise SettingsError(_why(engine.url, reason)) from None
            await asyncio.sleep(0.1)
        except CommandError as error:
            if "locate revision" in str(error):
                raise SettingsError(
                    f"the database {_shown(engine.url)} was made by a newer Tidegate: run that one, or give another catalog.url"
                ) from None
            raise SettingsError(f"the database {_shown(engine.url)} cannot be upgraded: {error}") from None
        except (SQLAlchemyError, sqlite3.Error, OSError) as error:
            raise SettingsError(_why(engine.url, str(getattr(error, "orig", None) or error))) from None
    raise AssertionError("the last try raises")


def migration_config(connection: Connection) -> Config:
    """Alembic's configuration for the shipped migrations.

    Args:
        connection: to run them on.

    Returns:
        The configuration.
    """
    config = Config()
    config.set_main_option("script_location", str(resources.files("tidegate.catalog").joinpath("migrations")).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _upgrade(connection: Connection) -> str:
    config = migration_config(connection)
    head = ScriptDirectory.from_config(config).get_current_head()
    assert head is not None, "the package ships its migrations"
    # Alembic is asked only where there is something to do: a start then writes nothing.
    if MigrationContext.configure(connection).get_current_revision() != head:
        command.upgrade(config, "head")
    return head


def _on_connect(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA journal_mode = WAL")  # readers go on while another process writes
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.close()


def _shown(url: URL) -> str:
    return str(Path(url.database or ":memory:"))


def _why(url: URL, reason: str) -> str:
    if "not a database" in reason or "malformed" in reason:
        remedy = "it is no SQLite database: move it away or give another catalog.url"
    elif "readonly" in reason or "unable to open" in reason:
        remedy = "give a catalog.url in a directory that is there and can be written"
    elif "already exists" in reason:
        remedy = "it holds tables of another program: give another catalog.url"
    else:
        remedy = "see 'tidegate doctor'"
    return f"the database {_shown(url)} cannot be opened ({reason}): {remedy}"
