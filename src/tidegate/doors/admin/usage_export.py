"""/admin/v1/usage/export."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import Query, Response

from tidegate.admin.models import Plain
from tidegate.admin.rules import CatalogEditor
from tidegate.doors.admin.common import AdminRouter, After, KeyId
from tidegate.ledger.export import MAX_ROWS, Format, LedgerFilter, read_days, read_ledger, render

NEXT_HEADER: Final = "X-Tidegate-Next"
"""The value of `after` for the next page; no such header on the last page."""

_TYPES: Final = {"csv": "text/csv; charset=utf-8", "jsonl": "application/jsonl"}
_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "A page of the ledger.",
        "content": {kind.partition(";")[0]: {"schema": {"type": "string"}} for kind in _TYPES.values()},
        "headers": {
            NEXT_HEADER: {"description": "'after' of the next page; absent on the last page", "schema": {"type": "string"}}
        },
    }
}

From = Annotated[
    str | None,
    Query(alias="from", max_length=40, description="first day (UTC), such as 2026-11-01; default: the first of the month"),
    Plain,
]
To = Annotated[
    str | None, Query(max_length=40, description="the day after the last one (UTC), such as 2026-12-01; default: tomorrow"), Plain
]
Rows = Annotated[int, Query(ge=1, le=MAX_ROWS, description="maximum number of rows")]
Customer = Annotated[str | None, Query(max_length=200, description="name of a customer; empty for rows without one"), Plain]


def usage_export_routes(editor: CatalogEditor) -> AdminRouter:
    """The route of the usage ledger."""
    routes = AdminRouter(tags=["usage"])
    database = editor.catalog.database

    @routes.get(
        "/usage/export",
        summary="Export the usage ledger: units by day, customer, API key and rule, in pages",
        response_class=Response,
        responses=_RESPONSES,
    )
    async def export(
        from_: From = None,
        to: To = None,
        format: Format = "csv",
        customer: Customer = None,
        api_key: KeyId = None,
        limit: Rows = MAX_ROWS,
        after: After = None,
    ) -> Response:
        page = await read_ledger(database, LedgerFilter(*read_days(from_, to), customer, api_key), after, limit)
        headers = {"Cache-Control": "no-store"} | ({} if page.next is None else {NEXT_HEADER: page.next})
        # The first page alone has the names of the columns: the pages of an export make one file.
        return Response(render(page.items, format, header=after is None), media_type=_TYPES[format], headers=headers)

    return routes
