"""Pages of a list.

A page begins after the last row of the previous one, never at a number: rows added or deleted in between neither repeat nor hide
others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import msgspec
from sqlalchemy import Select

from tidegate.catalog.sql.database import Database
from tidegate.errors import BadRequest

MAX_PAGE: Final = 500

Item = TypeVar("Item")


class Page(msgspec.Struct, Generic[Item], frozen=True):
    """A page of a list.

    Args:
        next: the `after` of the next page; None on the last page.
    """

    items: list[Item]
    next: str | None


def page_of(items: list[Item], limit: int, place: Callable[[Item], str]) -> Page[Item]:
    """The page of at most `limit` items; one more item means that another page follows.

    Args:
        items: at most `limit` + 1.
        place: what `after` must be to continue after an item.
    """
    return Page(items[:limit], place(items[limit - 1]) if len(items) > limit else None)


async def rows_of(database: Database, query: Select[Any], limit: int) -> list[Any]:
    """The rows of a page, and one more: it tells whether another page follows.

    Returns:
        At most `limit` + 1 rows.

    Raises:
        CatalogUnavailable: if the database does not answer.
    """
    async with database.reading() as connection:
        return list((await connection.execute(query.limit(limit + 1))).mappings().all())


def no_place(after: str) -> BadRequest:
    """The error of an `after` that no page gave as its `next`."""
    return BadRequest(f"after {after[:60]!r} is none of this list: give the 'next' of the page before", field="after")
