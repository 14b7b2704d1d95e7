"""Models of tiers."""

from __future__ import annotations

from tidegate.admin.models.base import Limits, OverageField, PageModel, Quotas, RequestModel, Resource, Row, TierName


class TierCreate(RequestModel):
    """A new tier."""

    name: TierName
    limits: Limits = []
    quotas: Quotas = []
    overage: OverageField = False


class TierLimits(RequestModel):
    """New limits and quotas of a tier."""

    limits: Limits
    quotas: Quotas = []
    overage: OverageField = False


class TierPatch(RequestModel):
    """Fields of a tier to change; omitted fields keep their values."""

    limits: Limits = []
    quotas: Quotas = []
    overage: OverageField = False


class TierRead(Resource):
    """A tier. `limits` and `quotas` apply to all its endpoints together; its rules are at /rate-limit-rules."""

    name: str
    limits: list[str]
    managed_by_file: bool
    revision: int
    warnings: list[str] = []
    quotas: list[str] = []
    overage: bool | dict[str, str] = False

    @classmethod
    def of_row(cls, row: Row) -> TierRead:
        """Of a row of `tiers`."""
        return cls._from_columns(row, quotas=row["quotas"] or [], overage=row["overage"] or False)


class TierPage(PageModel[TierRead]):
    """A page of tiers; send `next` as `after` for the next page."""
