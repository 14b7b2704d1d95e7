"""Models of the overrides for some subjects of a tier's rules."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tidegate.admin.models.base import (
    PageModel,
    RequestModel,
    Resource,
    Row,
    RuleLimits,
    RuleName,
    SubjectName,
    Timestamp,
)
from tidegate.policy.subject_overrides import override_id
from tidegate.timestamps import format_timestamp, now_us

SubjectValues = Annotated[
    dict[SubjectName, Annotated[str, Field(min_length=1, max_length=256)]],
    Field(
        min_length=1,
        max_length=8,
        examples=[{"user": "42"}],
        description="values by attribute; `*` matches any run of characters, an attribute that is left out any value",
    ),
]
Until = Annotated[Timestamp | None, Field(description="when it ends by itself; null for never")]


class SubjectOverrideFields(RequestModel):
    """Limits that replace those of a rule for some subjects."""

    limits: RuleLimits
    until: Until = None


class SubjectOverrideCreate(SubjectOverrideFields):
    """A new override. Its id follows from rule and subject."""

    rule: RuleName
    subject: SubjectValues


class SubjectOverrideRead(Resource):
    """Limits that replace those of a rule for some subjects, until `until`; `ended` says that they no longer do."""

    id: str
    tier: str
    rule: str
    subject: dict[str, str]
    limits: list[str]
    until: str | None
    ended: bool
    managed_by_file: bool
    revision: int

    @classmethod
    def of_entry(cls, tier: str, entry: Row) -> SubjectOverrideRead:
        """Of an entry of `subject_overrides`."""
        until_us = entry["until_us"]
        return cls(
            id=override_id(entry["rule"], entry["subject"]),
            tier=tier,
            rule=entry["rule"],
            subject=entry["subject"],
            limits=entry["limits"],
            until=format_timestamp(until_us),
            ended=until_us is not None and until_us <= now_us(),
            managed_by_file=entry["managed_by_file"],
            revision=entry["revision"],
        )

    @property
    def target(self) -> str:
        """Its name in the audit log."""
        return f"{self.tier}/{self.id}"


class SubjectOverridePage(PageModel[SubjectOverrideRead]):
    """A page of overrides; send `next` as `after` for the next page."""
