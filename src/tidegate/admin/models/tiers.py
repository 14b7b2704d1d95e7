"""Models of tiers."""

from __future__ import annotations

from tidegate.admin.models.base import Limits, PageModel, RequestModel, Resource, Row, TierName


class TierCreate(RequestModel):
    """A new tier."""

    name: TierName
    limits: Limits = []


class TierLimits(RequestModel):
    """New limits of a tier."""

    limits: Limits


class TierRead(Resource):
    """A tier. `limits` apply to all its endpoints together; its rules are at /rate-limit-rules."""

    name: str
    limits: list[str]
    managed_by_file: bool
    revision: int
    warnings: list[str] = []

    @classmethod
    def of_row(cls, row: Row) -> TierRead:
        """Of a row of `tiers`."""
        return cls._from_columns(row)


class TierPage(PageModel[TierRead]):
    """A page of tiers; send `next` as `after` for the next page."""
