"""What an error of a database means, read from its code: texts differ with the server's language and version.

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
_PASSING_STATES: Final = frozenset({"55P03", "40P01", "40001", "23505"})  # lock, deadlock, serialization; two that make one thing
_NO_ACCESS: Final = "28"
_NO_RESOURCES: Final = "53"
_SYSTEM: Final = "58"

_PASSING_CODES: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_NO_DATABASE_CODES: Final = frozenset({sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT})
_NO_PLACE_CODES: Final = frozenset({sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM})
_NO_WRITE_CODES: Final = _NO_PLACE_CODES | _NO_DATABASE_CODES | {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}

PLACE_REMEDY: Final = "give a catalog.url in a directory that is there and can be written"
FOREIGN_REMEDY: Final = "it holds tables of another program: give another catalog.url"
GRANT_REMEDY: Final = (
    "let its user make tables there, which since PostgreSQL 15 only the owner of the database may: "
    "GRANT USAGE, CREATE ON SCHEMA public TO that user"
)
_DISK_REMEDY: Final = "its disk is full or fails: free some space, then look at the system's log"


def sqlstate_of(error: BaseException) -> str | None:
    """The SQLSTATE that a PostgreSQL gave.

    Returns:
        Five characters; None where there is none, as for a connection that was not made.
    """
    for each in _causes(error):
        state = getattr(each, "sqlstate", None)
        if isinstance(state, str):
            return state
    return None


def sqlite_code_of(error: BaseException) -> int | None:
    """The primary result code that SQLite gave."""
    for each in _causes(error):
        code = getattr(each, "sqlite_errorcode", None)
        if isinstance(code, int):
            return code & 0xFF
    return None


def is_passing(error: BaseException) -> bool:
    """Whether another process was in the way, so that the same may succeed a little later.

    Returns:
        True for locks, deadlocks, and two that make the same thing at once.
    """
    return sqlstate_of(error) in _PASSING_STATES or sqlite_code_of(error) in _PASSING_CODES


def cannot_write(error: BaseException) -> bool:
    """Whether an error says that the database takes no writes at all: it is read-only, or its disk is full or fails.

    Returns:
        False for errors of one statement, and where it is not known.
    """
    state = sqlstate_of(error)
    if state is not None:
        return state in (READ_ONLY, INSUFFICIENT_PRIVILEGE) or state[:2] in (_NO_RESOURCES, _SYSTEM)
    return sqlite_code_of(error) in _NO_WRITE_CODES


def remedy_of(error: BaseException) -> str | None:
    """What to do about an error of opening or changing a catalog."""
    state, code = sqlstate_of(error), sqlite_code_of(error)
    if isinstance(error, OSError) or code in _NO_PLACE_CODES:
        return PLACE_REMEDY
    if code in _NO_DATABASE_CODES:
        return "it is not a SQLite database: move it away or give another catalog.url"
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return _DISK_REMEDY
    if code == sqlite3.SQLITE_ERROR and " already exists" in str(error):
        # SQLite has one code for every error in a statement, and one language for its texts.
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
    """An error, and what it was made of."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        original = getattr(current, "orig", None)
        current = original if isinstance(original, BaseException) else current.__cause__
