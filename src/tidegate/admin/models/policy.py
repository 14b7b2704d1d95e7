"""Models of the import of a policy."""

from __future__ import annotations

from pydantic import JsonValue

from tidegate.admin.models.base import ResponseModel


class ChangeRead(ResponseModel):
    """One change of an import."""

    action: str
    kind: str
    target: str
    before: dict[str, JsonValue] | None
    after: dict[str, JsonValue] | None


class ImportRead(ResponseModel):
    """What an import changed, or would change."""

    dry_run: bool
    changes: list[ChangeRead]
    warnings: list[str]
