"""Models of customers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, JsonValue

from tidegate.admin.models.base import Limits, PageModel, Plain, RequestModel, Resource, Row, SubjectName, TierName
from tidegate.admin.models.overrides import LimitOverride, Overrides, base_limits, listed_overrides
from tidegate.policy.customers import metadata_of
from tidegate.timestamps import format_timestamp

CustomerName = Annotated[
    str, Field(min_length=1, max_length=64, examples=["acme"], description="1 to 64 of letters, digits, '_', '.', '-'"), Plain
]
ExternalId = Annotated[str, Field(min_length=1, max_length=200, description="what other systems call the customer"), Plain]
AnchorDate = Annotated[
    str, Field(min_length=10, max_length=10, examples=["2026-01-31"], description="on whose day quota periods begin"), Plain
]
Timezone = Annotated[str, Field(min_length=1, max_length=64, examples=["Europe/Berlin"], description="IANA name"), Plain]
MatchValue = Annotated[str, Field(min_length=1, max_length=256), Plain]
CustomerMatch = Annotated[
    dict[SubjectName, MatchValue | list[MatchValue]],
    Field(max_length=16, examples=[{"org": "acme"}], description="attribute values that belong to the customer"),
]
Metadata = Annotated[dict[str, JsonValue], Field(description="a JSON object of at most 4 KB, for other systems")]


class CustomerFields(RequestModel):
    """The fields of a customer."""

    external_id: ExternalId | None = None
    tier: TierName | None = None
    anchor: AnchorDate | None = None
    timezone: Timezone | None = None
    metadata: Metadata = {}
    match: CustomerMatch = {}
    limits: Limits | None = None
    overrides: Overrides = []


class CustomerCreate(CustomerFields):
    """A new customer; its name never changes."""

    name: CustomerName


class CustomerPatch(CustomerFields):
    """Fields of a customer to change; omitted fields keep their values."""


class CustomerRead(Resource):
    """A customer."""

    name: str
    external_id: str | None
    tier: str | None
    anchor: str | None
    timezone: str | None
    metadata: dict[str, JsonValue]
    match: dict[str, list[str]]
    limits: list[str] | None
    overrides: list[LimitOverride]
    created_at: str
    managed_by_file: bool
    revision: int
    warnings: list[str] = []

    @classmethod
    def of_row(cls, row: Row) -> CustomerRead:
        """Of a row of `customers`, with the name of its tier as `tier_name`."""
        matched: dict[str, Any] = row["match_attributes"] or {}
        return cls._from_columns(
            row,
            tier=row["tier_name"],
            anchor=row["anchor"] or None,
            timezone=row["timezone"] or None,
            metadata=metadata_of(row["metadata"]),
            match={name: list(values) for name, values in sorted(matched.items())},
            limits=base_limits(row["overrides"]),
            overrides=listed_overrides(row["overrides"]),
            created_at=format_timestamp(row["created_at_us"]),
        )


class CustomerPage(PageModel[CustomerRead]):
    """A page of customers; send `next` as `after` for the next page."""
