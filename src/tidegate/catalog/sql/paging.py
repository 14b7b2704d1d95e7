"""Pages of a list.

A page starts after the last row of the previous one, never at an offset: rows added or deleted in between neither repeat nor hide
others.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import msgspec
from sqlalchemy import Select

from tidegate.catalog.sql.database import Database
from tidegate.errors import BadRequest

MAX_PAGE: Final = 500

Item = TypeVar("Item")
_Position = TypeVar("_Position", bound=tuple[Any, ...])


class Page(msgspec.Struct, Generic[Item], frozen=True):
    """A page of a list.

    Args:
        next: the value of `after` for the next page; None on the last page.
    """

    items: list[Item]
    next: str | None


def page_of(items: list[Item], limit: int, cursor_of: Callable[[Item], str]) -> Page[Item]:
    """The page of the first `limit` items; one more item means that another page follows.

    Args:
        items: at most `limit` + 1.
        cursor_of: returns the value of `after` that continues after an item.
    """
    return Page(items[:limit], cursor_of(items[limit - 1]) if len(items) > limit else None)


async def rows_of(database: Database, query: Select[Any], limit: int) -> list[Any]:
    """The rows of a page, and one more if another page follows: at most `limit` + 1.

    Raises:
        CatalogUnavailable: if the database does not answer.
    """
    async with database.reading() as connection:
        return list((await connection.execute(query.limit(limit + 1))).mappings().all())


def invalid_cursor(after: str) -> BadRequest:
    """The error for an `after` that is not the `next` of a page."""
    return BadRequest(f"after {after[:60]!r} is not valid for this list: use the 'next' of the previous page", field="after")


def cursor_of(position: tuple[Any, ...]) -> str:
    """A cursor for a position of several values: the key of the last row of a page."""
    return base64.urlsafe_b64encode(msgspec.json.encode(position)).decode().rstrip("=")


def parse_cursor(after: str, kind: type[_Position]) -> _Position:
    """The position of a cursor; numbers are 0 or more, texts have no NUL, which PostgreSQL rejects.

    Raises:
        BadRequest: if it is not valid.
    """
    try:
        position: _Position = msgspec.json.decode(base64.urlsafe_b64decode(after + "=" * (-len(after) % 4)), type=kind)
    except (ValueError, binascii.Error, msgspec.MsgspecError):
        raise invalid_cursor(after) from None
    if any("\0" in value if isinstance(value, str) else not 0 <= value < 2**62 for value in position):
        raise invalid_cursor(after)
    return position
