"""Models of the tokens of gateways and back ends, as the control plane receives and sends them."""

from __future__ import annotations

import time
from typing import Annotated, Literal

from pydantic import Field

from tidegate.admin.models import PageModel, Plain, RequestModel, Resource, Row, Timestamp
from tidegate.timestamps import format_timestamp

CallerScope = Literal["check", "limit", "hold", "lease"]


class CallerTokenCreate(RequestModel):
    """A token of a gateway or back end, to be made."""

    name: Annotated[str, Field(min_length=1, max_length=200), Plain]
    scopes: Annotated[list[CallerScope], Field(min_length=1, max_length=4, default_factory=lambda: ["check"])]
    expires_at: Timestamp | None = None


class CallerTokenRead(Resource):
    """A token of a gateway or back end, without the token."""

    id: int
    name: str
    scopes: list[str]
    status: str
    created_at: str
    expires_at: str | None
    revoked_at: str | None

    @classmethod
    def of_row(cls, row: Row) -> CallerTokenRead:
        """Of a row of `caller_tokens`."""
        until_us = row["expires_at_us"]
        expired = until_us is not None and until_us * 1000 <= time.time_ns()
        return cls(
            id=row["id"],
            name=row["name"],
            scopes=list(row["scopes"]),
            status="revoked" if row["revoked_at_us"] is not None else "expired" if expired else "active",
            created_at=format_timestamp(row["created_at_us"]),
            expires_at=format_timestamp(row["expires_at_us"]),
            revoked_at=format_timestamp(row["revoked_at_us"]),
        )


class CallerTokenMade(CallerTokenRead):
    """A token that was just made: the token itself is in this response only."""

    token: str


class CallerTokenRotated(CallerTokenMade):
    """The new token of a rotation, and the one that it replaces."""

    replaces: CallerTokenRead


class CallerTokenPage(PageModel[CallerTokenRead]):
    """A page of callers' tokens; `next` is what to give as `after`."""
