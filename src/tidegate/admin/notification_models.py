"""Models of notifications."""

from __future__ import annotations

import json
from typing import Literal, TypeAlias

from pydantic import JsonValue

from tidegate.admin.models.base import PageModel, Resource, Row
from tidegate.timestamps import format_timestamp

NotificationStatus: TypeAlias = Literal["pending", "delivered", "failed"]


class NotificationRead(Resource):
    """A notification; `status` is pending (waiting for its first or next attempt), delivered, or failed (given up)."""

    id: str
    event: str
    subject: str
    url: str
    body: dict[str, JsonValue]
    status: str
    attempts: int
    created_at: str
    attempted_at: str | None
    next_attempt_at: str | None
    answer: int | None
    error: str | None

    @classmethod
    def of_row(cls, row: Row) -> NotificationRead:
        """Of a row of `notifications`."""
        return cls._from_columns(
            row,
            body=json.loads(row["body"]),
            created_at=format_timestamp(row["created_at_us"]),
            attempted_at=format_timestamp(row["attempted_at_us"]),
            next_attempt_at=format_timestamp(row["next_at_us"]) if row["status"] == "pending" else None,
        )


class NotificationPage(PageModel[NotificationRead]):
    """A page of notifications, the newest first; send `next` as `after` for the next page."""
