"""Classifies errors of databases by their codes: messages depend on the server's language and version.

Sources: SQLSTATE classes of PostgreSQL (its documentation, appendix A); result codes of SQLite (sqlite.org/rescode.html).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Final

# SQLSTATE
INSUFFICIENT_PRIVILEGE: Final = "42501"
INVALID_SCHEMA: Final = "3F000"
NO_DATABASE: Final = "3D000"
READ_ONLY: Final = "25006"
_DUPLICATES: Final = frozenset({"42P07", "42710", "42P06"})
_TRANSIENT_STATES: Final = frozenset({"55P03", "40P01", "40001", "23505"})  # locks, deadlock, serialization, duplicate key
_NO_ACCESS: Final = "28"
_NO_RESOURCES: Final = "53"
_SYSTEM: Final = "58"

_TRANSIENT_CODES: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_NO_DATABASE_CODES: Final = frozenset({sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT})
_PATH_CODES: Final = frozenset({sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM})
_NO_WRITE_CODES: Final = _PATH_CODES | _NO_DATABASE_CODES | {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}

PATH_REMEDY: Final = "give a catalog.url in a directory that is there and can be written"
FOREIGN_REMEDY: Final = "it holds tables of another program: give another catalog.url"
GRANT_REMEDY: Final = (
    "let its user make tables there, which since PostgreSQL 15 only the owner of the database may: "
    "GRANT USAGE, CREATE ON SCHEMA public TO that user"
)
_DISK_REMEDY: Final = "its disk is full or fails: free some space, then look at the system's log"


def sqlstate_of(error: BaseException) -> str | None:
    """The SQLSTATE of an error of PostgreSQL: five characters; None if there is none, as for a failed connection."""
    for each in _causes(error):
        state = getattr(each, "sqlstate", None)
        if isinstance(state, str):
            return state
    return None


def sqlite_code_of(error: BaseException) -> int | None:
    """The primary result code of an error of SQLite; None if there is none."""
    for each in _causes(error):
        code = getattr(each, "sqlite_errorcode", None)
        if isinstance(code, int):
            return code & 0xFF
    return None


def is_transient(error: BaseException) -> bool:
    """Whether a retry may succeed: lock conflicts, deadlocks, and concurrent creation of the same object."""
    return sqlstate_of(error) in _TRANSIENT_STATES or sqlite_code_of(error) in _TRANSIENT_CODES


def cannot_write(error: BaseException) -> bool:
    """Whether an error means that the database is not writable at all: it is read-only, or its disk is full or fails.

    Returns:
        False for errors of one statement, and for unknown errors.
    """
    state = sqlstate_of(error)
    if state is not None:
        return state in (READ_ONLY, INSUFFICIENT_PRIVILEGE) or state[:2] in (_NO_RESOURCES, _SYSTEM)
    return sqlite_code_of(error) in _NO_WRITE_CODES


def remedy_of(error: BaseException) -> str | None:
    """The remedy for an error while opening or changing a catalog; None if the code has no specific one."""
    state, code = sqlstate_of(error), sqlite_code_of(error)
    if isinstance(error, OSError) or code in _PATH_CODES:
        return PATH_REMEDY
    if code in _NO_DATABASE_CODES:
        return "it is not a SQLite database: move it away or give another catalog.url"
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return _DISK_REMEDY
    if code == sqlite3.SQLITE_ERROR and " already exists" in str(error):
        # SQLite has one code for all errors of a statement; its messages are always in English.
        return FOREIGN_REMEDY
    if state is None:
        return None
    if state in (INSUFFICIENT_PRIVILEGE, INVALID_SCHEMA):
        return GRANT_REMEDY
    if state in _DUPLICATES:
        return FOREIGN_REMEDY
    if state == READ_ONLY:
        return "it is a standby: catalog.url must name the primary, or all hosts that may be it"
    if state.startswith(_NO_ACCESS):
        return "give catalog.url a user that may connect, and the right password"
    if state == NO_DATABASE:
        return "make the database first: createdb"
    if state[:2] in (_NO_RESOURCES, _SYSTEM):
        return _DISK_REMEDY if state != "53300" else "it has no connection left: raise max_connections or lower catalog.pool_size"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and the chain of its causes."""
    visited: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in visited:
        visited.add(id(current))
        yield current
        original = getattr(current, "orig", None)
        current = original if isinstance(original, BaseException) else current.__cause__
