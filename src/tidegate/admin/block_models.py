"""Blocks as the control plane receives and sends them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tidegate.admin.models import KeyId, PageModel, Plain, RequestModel, Resource, Row, Timestamp
from tidegate.admin.models.base import SubjectName
from tidegate.catalog.blocks import API_KEY_ID, ATTRIBUTE, CIDR, CUSTOMER, attributes_of
from tidegate.timestamps import format_timestamp, now_us

BlockStatus = Literal["active", "ended", "all"]
BlockKind = Literal["cidr", "api_key_id", "customer", "attribute"]


class BlockCreate(RequestModel):
    """Whom to block: exactly one of the first four."""

    cidr: (
        Annotated[str, Field(max_length=64, examples=["203.0.113.0/24"], description="a network or an address"), Plain] | None
    ) = None
    api_key_id: Annotated[KeyId | None, Field(description="id of an API key; blocks the keys that replaced it too")] = None
    customer: Annotated[str, Field(min_length=1, max_length=64), Plain] | None = None
    attribute: Annotated[
        dict[SubjectName, Annotated[str, Field(min_length=1, max_length=256), Plain]] | None,
        Field(max_length=16, examples=[{"user": "42"}], description="exact values, all of which a check must have"),
    ] = None
    until: Annotated[Timestamp | None, Field(description="when it ends by itself; without it, when it is deleted")] = None
    reason: Annotated[str, Field(max_length=1000, description="for operators; never shown to the blocked client"), Plain] = ""
    message: Annotated[str, Field(max_length=200, description="what the blocked client is shown"), Plain] = ""


class BlockRead(Resource):
    """A block; `status` is active, expired (its time has passed) or removed."""

    id: int
    cidr: str | None
    api_key_id: str | None
    customer: str | None
    attribute: dict[str, str] | None
    status: str
    reason: str
    message: str
    created_at: str
    created_by: str
    until: str | None
    removed_at: str | None

    @classmethod
    def of_row(cls, row: Row) -> BlockRead:
        """Of a row of `blocks`."""
        kind, target, until_us = row["kind"], row["target"], row["until_us"]
        # A row that makes room for a new block of the same target ends when its time had passed.
        removed = row["ended_at_us"] is not None and (until_us is None or row["ended_at_us"] < until_us)
        expired = until_us is not None and until_us <= now_us()
        return cls(
            id=row["id"],
            cidr=target if kind == CIDR else None,
            api_key_id=target if kind == API_KEY_ID else None,
            customer=target if kind == CUSTOMER else None,
            attribute=attributes_of(target) if kind == ATTRIBUTE else None,
            status="removed" if removed else "expired" if expired else "active",
            reason=row["reason"],
            message=row["message"],
            created_at=format_timestamp(row["created_at_us"]),
            created_by=row["created_by"],
            until=format_timestamp(until_us),
            removed_at=format_timestamp(row["ended_at_us"]) if removed else None,
        )


class BlockPage(PageModel[BlockRead]):
    """A page of blocks, the newest first; `next` is what to give as `after`."""
