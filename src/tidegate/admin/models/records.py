"""Models of the audit log and of violations."""

from __future__ import annotations

from pydantic import ConfigDict, JsonValue

from tidegate.admin.models.base import PageModel, ResponseModel, Row
from tidegate.timestamps import format_timestamp


class AuditRead(ResponseModel):
    """A change: its author, the state before it, and the state after it."""

    id: int
    at: str
    actor: str
    action: str
    kind: str
    target: str
    before: dict[str, JsonValue] | None
    after: dict[str, JsonValue] | None

    @classmethod
    def of_row(cls, row: Row) -> AuditRead:
        """Of a row of `audit_log`."""
        return cls._from_columns(row, at=format_timestamp(row["at_us"]))


class AuditPage(PageModel[AuditRead]):
    """A page of the audit log, newest first; send `next` as `after` for the next page."""


class ViolationRead(ResponseModel):
    """A minute in which a rule blocked a subject."""

    model_config = ConfigDict(from_attributes=True)

    minute: str
    tier: str
    rule: str
    subject: str
    blocked: int


class ViolationPage(PageModel[ViolationRead]):
    """A page of violations, newest first; send `next` as `after` for the next page."""


class ViolatorRead(ResponseModel):
    """How many checks were blocked; fields that they were not grouped by are null."""

    model_config = ConfigDict(from_attributes=True)

    subject: str | None
    tier: str | None
    rule: str | None
    customer: str | None
    blocked: int


class TopRead(ResponseModel):
    """What was blocked most, highest counts first."""

    items: list[ViolatorRead]
