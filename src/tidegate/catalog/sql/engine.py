"""Engines for the catalog's URLs: SQLite in a file or in memory, PostgreSQL through psycopg.

The differences between the two are here and in `schema`; all other modules are the same for both.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

from sqlalchemy import RowMapping, Select, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import QueuePool, StaticPool

from tidegate.catalog.sql.sqlite_reader import SqliteReader
from tidegate.errors import SettingsError
from tidegate.url_parts import is_postgres_url, scheme_of, without_secrets

POSTGRES_SCHEMES: Final = ("postgresql", "postgres")
LOWER: Final = "tidegate_lower"
"""A function on connections to SQLite: lower case of any script. SQLite's own `lower` and LIKE support ASCII only."""
BUSY_TIMEOUT_MS: Final = 5_000


def is_postgres(url: str) -> bool:
    """Whether a URL is `postgresql://` or `postgres://`."""
    return url.partition("://")[0] in POSTGRES_SCHEMES


def open_engine(
    url: str,
    *,
    setting: str = "catalog.url",
    writes: bool = True,
    reads_only: bool = False,
    inspect_only: bool = False,
    pool_size: int = 8,
    timeout_s: float = 2.0,
) -> AsyncEngine:
    """An engine for a catalog's URL; nothing is connected yet.

    Args:
        url: `sqlite:///relative.db`, `sqlite:////absolute.db`, `sqlite://` for memory, or a PostgreSQL URL as libpq reads it:
            `postgresql://user@host1,host2/name?sslmode=verify-full`.
        setting: name of the setting with this URL, for messages.
        writes: whether the server must be writable: of several hosts, connect to the current primary.
        reads_only: use autocommit, which saves two of three round trips per query on PostgreSQL.
        inspect_only: do not create, prepare or write a SQLite file.
        pool_size: maximum number of connections, and so of concurrent queries.
        timeout_s: time limit of an answer of PostgreSQL, and of the wait for a free connection, s.

    Raises:
        SettingsError: if the URL is invalid or not supported, or psycopg is not installed.
    """
    if is_postgres(url):
        engine = _postgres(url, setting, writes=writes, pool_size=pool_size, timeout_s=timeout_s)
        return engine.execution_options(isolation_level="AUTOCOMMIT") if reads_only else engine
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise SettingsError(
            f"{setting} is not a valid database URL; use 'sqlite:///tidegate.db' or 'postgresql://user@host/name'"
        ) from None
    if parsed.drivername == "sqlite" and (parsed.host or parsed.username):
        raise SettingsError(
            f"{setting} names a host, but SQLite has files only: write 'sqlite:///tidegate.db' with three slashes"
        )
    if parsed.drivername != "sqlite":
        # Only the scheme is repeated: the rest of a database's URL may hold a password.
        raise SettingsError(
            f"{setting} has the scheme {scheme_of(url)!r}, which is not supported: use 'sqlite:///tidegate.db' "
            "or 'postgresql://user@host/name'"
        )
    return _sqlite(parsed, pool_size, timeout_s, inspect_only)


def checked_out(engine: AsyncEngine) -> int:
    """Connections of an engine that are in use."""
    return engine.pool.checkedout() if isinstance(engine.pool, QueuePool) else 0


def sqlite_reader(engine: AsyncEngine) -> SqliteReader | None:
    """What reads the same database for checks, in as many queries at a time; None unless it is a SQLite file.

    Args:
        engine: from `open_engine`.
    """
    if engine.dialect.name != "sqlite" or not isinstance(engine.pool, QueuePool):
        return None
    threads = engine.pool.size()
    reader = create_engine(engine.url.set(drivername="sqlite+pysqlite"), pool_size=threads, max_overflow=0)
    event.listen(reader, "connect", _prepare_sqlite)
    return SqliteReader(reader, threads)


def redacted_url(url: str) -> str:
    """A catalog's URL for messages and logs.

    Returns:
        The URL without user, password and options; only the scheme if the URL cannot be parsed.
    """
    return without_secrets(url)


def reason_of(error: Exception) -> str:
    """The first line of a database's error message."""
    return (str(getattr(error, "orig", None) or error).splitlines() or [type(error).__name__])[0]


def make_private(file: str) -> None:
    """Create a missing SQLite database file with mode 600.

    It contains digests of keys and tokens, and addresses of clients. The files that SQLite creates beside it get the same mode.
    An existing file keeps its mode: an operator may have opened it to a group on purpose.

    Raises:
        OSError: if it cannot be created.
    """
    if os.path.lexists(file):
        return
    with contextlib.suppress(FileExistsError):  # another process has created it
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def _sqlite(parsed: URL, pool_size: int, timeout_s: float, inspect_only: bool) -> AsyncEngine:
    in_memory = parsed.database in (None, "", ":memory:")
    options: dict[str, Any] = {"poolclass": StaticPool}
    if not in_memory:
        # Writers wait for each other up to SQLite's busy timeout, and so for a connection.
        options = {"pool_size": pool_size, "max_overflow": 0, "pool_timeout": max(timeout_s, BUSY_TIMEOUT_MS / 1000)}
        if inspect_only:
            # Not `mode=ro`, which leaves files beside a database in WAL mode.
            parsed = parsed.set(database=f"file:{quote(str(parsed.database))}", query={"uri": "true", "mode": "rw"})
    engine = create_async_engine(parsed.set(drivername="sqlite+aiosqlite"), **options)
    event.listen(engine.sync_engine, "connect", _prepare_inspection if inspect_only else _prepare_sqlite)
    return engine


def _postgres(url: str, setting: str, *, writes: bool, pool_size: int, timeout_s: float) -> AsyncEngine:
    if not is_postgres_url(url):
        raise SettingsError(
            f"{setting} cannot be read as a PostgreSQL URL: percent-encode '/', '@' and ':' in user and password (%2F, %40, "
            "%3A), and write ports as numbers, e.g. postgresql://user:pass%2Fword@127.0.0.1:5432/name"
        )
    creator = postgres_creator(url, setting, writes=writes, timeout_s=timeout_s)
    return create_async_engine(
        "postgresql+psycopg://",
        async_creator=creator,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=timeout_s,
        # Detects connections closed by a failover or a firewall before a query fails on them.
        pool_pre_ping=True,
        pool_use_lifo=True,
        pool_recycle=1800,
    )


def postgres_creator(url: str, setting: str, *, writes: bool, timeout_s: float) -> Callable[[], Any]:
    """A function that opens connections to PostgreSQL.

    Raises:
        SettingsError: if libpq does not understand the URL, or psycopg is not installed.
    """
    try:
        # Imported here: a catalog in SQLite needs no PostgreSQL client.
        from tidegate.catalog.sql.postgres_connection import connection_factory
    except ImportError as error:
        raise SettingsError(
            f"{setting} is a PostgreSQL, which needs psycopg ({error}): pip install 'tidegate[postgres]'"
        ) from None
    return connection_factory(url, setting, writes=writes, timeout_s=timeout_s)


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.create_function(LOWER, 1, _lower, deterministic=True)
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA journal_mode = WAL")  # readers are not blocked while another process writes
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.close()


def _lower(text: object) -> object:
    return text.lower() if isinstance(text, str) else text


def _prepare_inspection(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA query_only = ON")
    cursor.close()


async def read_rows(engine: AsyncEngine, query: Select[Any], parameters: Mapping[str, Any] | None) -> Sequence[RowMapping]:
    """The rows of a query; once more on another connection if the first one is cut while it runs.

    An operator or a proxy that cuts a connection says nothing about the database: a new connection shows whether it answers.

    Raises:
        SQLAlchemyError: if the database does not answer, or rejects the query.
        OSError: if it cannot be reached.
    """
    try:
        return await _read_once(engine, query, parameters)
    except DBAPIError as error:
        if not error.connection_invalidated:
            raise
        return await _read_once(engine, query, parameters)


async def _read_once(engine: AsyncEngine, query: Select[Any], parameters: Mapping[str, Any] | None) -> Sequence[RowMapping]:
    async with engine.connect() as connection:
        rows: Sequence[RowMapping] = (await connection.execute(query, parameters)).mappings().all()
    return rows
