"""Engines for the catalog's URLs: SQLite in a file or in memory, PostgreSQL through psycopg.

What differs between the two stands here and in `schema`; everything else is one body for both.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import quote

from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

from tidegate.errors import SettingsError
from tidegate.url_parts import is_postgres_url, scheme_of, without_secrets

POSTGRES_SCHEMES: Final = ("postgresql", "postgres")
LOWER: Final = "tidegate_lower"
"""A function on connections to SQLite: lower case of any script. SQLite's own `lower` and LIKE know ASCII only."""
BUSY_TIMEOUT_MS: Final = 5_000


def is_postgres(url: str) -> bool:
    """Whether a URL names a PostgreSQL.

    Returns:
        True for `postgresql://` and `postgres://`.
    """
    return url.partition("://")[0] in POSTGRES_SCHEMES


def open_engine(
    url: str,
    *,
    setting: str = "catalog.url",
    writes: bool = True,
    reads_only: bool = False,
    looks_only: bool = False,
    pool_size: int = 8,
    timeout_s: float = 2.0,
) -> AsyncEngine:
    """An engine for a catalog's URL; nothing is connected yet.

    Args:
        url: `sqlite:///relative.db`, `sqlite:////absolute.db`, `sqlite://` for memory, or a PostgreSQL URL as libpq reads it:
            `postgresql://user@host1,host2/name?sslmode=verify-full`.
        setting: whose value the URL is, for messages.
        writes: whether it must be a database that takes writes: of several hosts the primary, wherever it is now.
        reads_only: whether every statement stands for itself, which saves PostgreSQL two of three round trips a query.
        looks_only: whether a file of SQLite is to be left as it is: not made, not prepared, not written to.
        pool_size: most connections, and so most queries at once.
        timeout_s: how long one answer of a PostgreSQL may take, and how long to wait for a free connection, s.

    Raises:
        SettingsError: if the URL names no database that this version has, or psycopg is not installed.
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
    return _sqlite(parsed, pool_size, timeout_s, looks_only)


def shown(url: str) -> str:
    """A catalog's URL as messages may show it.

    Returns:
        The URL without user, password and options; the scheme alone where these cannot be told apart.
    """
    return without_secrets(url)


def reason_of(error: Exception) -> str:
    """What a database said, in a line."""
    return (str(getattr(error, "orig", None) or error).splitlines() or [type(error).__name__])[0]


def make_private(file: str) -> None:
    """Make the file of a SQLite database, where it is not there, for its owner alone.

    It holds digests of keys and tokens, and addresses of clients. The files that SQLite makes beside it get the same mode.
    One that is there keeps its mode: somebody may have given it to a group on purpose.

    Raises:
        OSError: if it cannot be made.
    """
    if os.path.lexists(file):
        return
    with contextlib.suppress(FileExistsError):  # another process made it meanwhile
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def _sqlite(parsed: URL, pool_size: int, timeout_s: float, looks_only: bool) -> AsyncEngine:
    in_memory = parsed.database in (None, "", ":memory:")
    options: dict[str, Any] = {"poolclass": StaticPool}
    if not in_memory:
        # Writers wait for each other as long as SQLite lets them, and so for a connection.
        options = {"pool_size": pool_size, "max_overflow": 0, "pool_timeout": max(timeout_s, BUSY_TIMEOUT_MS / 1000)}
        if looks_only:
            # Not `mode=ro`, which leaves files behind beside one in WAL mode.
            parsed = parsed.set(database=f"file:{quote(str(parsed.database))}", query={"uri": "true", "mode": "rw"})
    engine = create_async_engine(parsed.set(drivername="sqlite+aiosqlite"), **options)
    event.listen(engine.sync_engine, "connect", _look_at_sqlite if looks_only else _prepare_sqlite)
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
        # A connection that a failover or a firewall took away is found before a query is lost on it.
        pool_pre_ping=True,
        pool_use_lifo=True,
        pool_recycle=1800,
    )


def postgres_creator(url: str, setting: str, *, writes: bool, timeout_s: float) -> Callable[[], Any]:
    """What makes connections to a PostgreSQL.

    Raises:
        SettingsError: if libpq does not understand the URL, or psycopg is not installed.
    """
    try:
        # Imported here: who keeps the catalog in SQLite needs no PostgreSQL client.
        from tidegate.catalog.sql.postgres_connection import connecting
    except ImportError as error:
        raise SettingsError(
            f"{setting} is a PostgreSQL, which needs psycopg ({error}): pip install 'tidegate[postgres]'"
        ) from None
    return connecting(url, setting, writes=writes, timeout_s=timeout_s)


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.create_function(LOWER, 1, _lower, deterministic=True)
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA journal_mode = WAL")  # readers go on while another process writes
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.close()


def _lower(text: object) -> object:
    return text.lower() if isinstance(text, str) else text


def _look_at_sqlite(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA query_only = ON")
    cursor.close()
