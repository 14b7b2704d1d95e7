"""Models of tokens of the control plane."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tidegate.admin.models.base import PageModel, Plain, RequestModel, Resource, Role, Row, Timestamp
from tidegate.timestamps import format_timestamp


class TokenCreate(RequestModel):
    """A new token."""

    name: Annotated[str, Field(min_length=1, max_length=200), Plain]
    role: Role = "viewer"
    expires_at: Timestamp | None = None


class TokenRead(Resource):
    """The record of a token of the control plane, without the token."""

    id: int
    name: str
    role: str
    created_at: str
    expires_at: str | None
    revoked_at: str | None

    @classmethod
    def of_row(cls, row: Row) -> TokenRead:
        """Of a row of `admin_tokens`."""
        return cls._from_columns(
            row,
            created_at=format_timestamp(row["created_at_us"]),
            expires_at=format_timestamp(row["expires_at_us"]),
            revoked_at=format_timestamp(row["revoked_at_us"]),
        )


class TokenMade(TokenRead):
    """A new token; the token itself is returned only once."""

    token: str


class TokenPage(PageModel[TokenRead]):
    """A page of tokens; send `next` as `after` for the next page."""
