"""/admin/v1/tiers/{name}/overrides."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query, Response

from tidegate.admin.models import Plain
from tidegate.admin.models.base import KeyId
from tidegate.admin.models.subject_overrides import (
    SubjectOverrideCreate,
    SubjectOverrideFields,
    SubjectOverridePage,
    SubjectOverrideRead,
)
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.subject_overrides import create_override, delete_override, edit_override, get_override, list_overrides
from tidegate.doors.admin.common import EDIT_ERRORS, Actor, AdminRouter, After, Exactly, Limit, Revisions, tagged

NameInPath = Annotated[str, Path(max_length=64), Plain]
SubjectFilter = Annotated[
    str | None,
    Query(max_length=1000, description="only overrides whose values match this subject, such as user=42 or org=acme&user=42"),
    Plain,
]


def override_routes(editor: CatalogEditor) -> AdminRouter:
    """The routes of overrides for subjects."""
    routes = AdminRouter(prefix="/tiers/{name}/overrides", tags=["tiers"])

    @routes.get("", summary="List the overrides of a tier for subjects, by id")
    async def read_all(
        name: NameInPath, limit: Limit = 100, after: After = None, rule: Exactly = None, subject: SubjectFilter = None
    ) -> SubjectOverridePage:
        page = await list_overrides(editor, name, limit, after, rule, subject)
        return SubjectOverridePage(items=page.items, next=page.next)

    @routes.post("", status_code=201, summary="Give some subjects of a rule other limits")
    async def create(name: NameInPath, request: SubjectOverrideCreate, response: Response, actor: Actor) -> SubjectOverrideRead:
        return tagged(response, await create_override(editor, actor, name, request))

    @routes.get("/{override_id}", summary="Read an override")
    async def read(name: NameInPath, override_id: KeyId, response: Response) -> SubjectOverrideRead:
        return tagged(response, await get_override(editor, name, override_id))

    @routes.put("/{override_id}", summary="Replace the limits and the end of an override", responses=EDIT_ERRORS)
    async def replace(
        name: NameInPath,
        override_id: KeyId,
        request: SubjectOverrideFields,
        response: Response,
        actor: Actor,
        revisions: Revisions,
    ) -> SubjectOverrideRead:
        return tagged(response, await edit_override(editor, actor, name, override_id, request, revisions))

    @routes.delete("/{override_id}", status_code=204, summary="Delete an override", responses=EDIT_ERRORS)
    async def remove(name: NameInPath, override_id: KeyId, actor: Actor, revisions: Revisions) -> None:
        await delete_override(editor, actor, name, override_id, revisions)

    return routes
