"""Pages of a list.

A page begins after the last row of the previous one, never at a number: rows added or deleted in between neither repeat nor hide
others.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from sqlalchemy import Select

from tidegate.catalog.sql.database import Database
from tidegate.errors import BadRequest

MAX_PAGE: Final = 500


class Page(msgspec.Struct, frozen=True):
    """A page of a list.

    Args:
        items: in order, each as a JSON object.
        next: what to give as `after` for the page behind this one; None where this is the last.
    """

    items: list[dict[str, Any]]
    next: str | None


async def rows_of(database: Database, query: Select[Any], limit: int) -> list[Any]:
    """The rows of a page, and one more: it tells whether another page follows.

    Args:
        database: the catalog's.
        query: in the page's order.
        limit: most rows of the page.

    Returns:
        At most `limit` + 1 rows.

    Raises:
        CatalogUnavailable: if the database does not answer.
    """
    async with database.reading() as connection:
        return list((await connection.execute(query.limit(limit + 1))).mappings().all())


def no_place(after: str) -> BadRequest:
    """The error of an `after` that no page gave as its `next`.

    Args:
        after: what was given.

    Returns:
        The error.
    """
    return BadRequest(f"after {after[:60]!r} is none of this list: give the 'next' of the page before", field="after")
