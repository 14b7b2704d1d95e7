"""Schema of a new SQLite database without running the migrations again, in processes that `fork_server` forks.

The migrations take 0.1 s of CPU time, half of what a forked `tidegate serve` takes to start. What they make is recorded once, and
copied where a process finds an empty database. `tidegate db` runs the migrations themselves, and so does every process on
PostgreSQL and on a database of an older version.
"""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
import types
from pathlib import Path

from alembic import command as migrations
from alembic.config import Config
from alembic.runtime.migration import MigrationContext

from tidegate.catalog.sql import schema
from tidegate.catalog.sql.catalog import SqlCatalog


def record_schema() -> list[str]:
    """Run the migrations on a new database, and open its catalog, which prepares what a process prepares at its first use.

    Returns:
        The statements that make a copy.
    """
    with tempfile.TemporaryDirectory(prefix="tidegate-schema-") as directory:
        file = Path(directory) / "tidegate.db"
        asyncio.run(_open_once(f"sqlite:///{file}"))
        connection = sqlite3.connect(file)
        try:
            statements = list(connection.iterdump())
        finally:
            connection.close()
    assert (statements[0], statements[-1]) == ("BEGIN TRANSACTION;", "COMMIT;")
    return statements[1:-1]


async def _open_once(url: str) -> None:
    catalog = await SqlCatalog.open(url)
    await catalog.version()
    await catalog.close()


def copy_schema(statements: list[str]) -> None:
    """From now on, let this process make an empty SQLite database with statements of `record_schema`."""

    def upgrade(config: Config, revision: str) -> None:
        connection = config.attributes["connection"]
        if connection.dialect.name != "sqlite" or MigrationContext.configure(connection).get_current_revision() is not None:
            migrations.upgrade(config, revision)
            return
        for statement in statements:
            connection.exec_driver_sql(statement)

    copying = types.SimpleNamespace(**{**vars(migrations), "upgrade": upgrade})
    setattr(schema, "command", copying)  # noqa: B010 - the module does not export it
