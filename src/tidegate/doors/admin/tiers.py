"""/admin/v1/tiers."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Path, Response

from tidegate.admin.lists import get_tier, list_tiers
from tidegate.admin.models import Plain, TierCreate, TierLimits, TierPage, TierPatch, TierRead
from tidegate.admin.over_limit import used_up_in_tier
from tidegate.admin.rules import CatalogEditor
from tidegate.doors.admin.common import EDIT_ERRORS, Actor, AdminRouter, After, Contains, Limit, Revisions, tagged
from tidegate.errors import BadRequest
from tidegate.gate.gate import Gate

NameInPath = Annotated[str, Path(max_length=64), Plain]


def tier_routes(editor: CatalogEditor, gate: Gate) -> AdminRouter:
    """The routes of tiers."""
    routes = AdminRouter(prefix="/tiers", tags=["tiers"])

    async def changed(response: Response, actor: str, name: str, fields: dict[str, Any], revisions: Any) -> TierRead:
        tier = tagged(
            response,
            await editor.edit_tier(actor, name, fields.get("limits"), revisions, fields.get("quotas"), fields.get("overage")),
        )
        return tier.model_copy(update={"warnings": await used_up_in_tier(editor, gate, name, None)})

    @routes.get("", summary="List tiers, by name")
    async def read_all(limit: Limit = 100, after: After = None, name: Contains = None) -> TierPage:
        page = await list_tiers(editor, limit, after, name)
        return TierPage(items=page.items, next=page.next)

    @routes.post("", status_code=201, summary="Create a tier without rules")
    async def create(request: TierCreate, response: Response, actor: Actor) -> TierRead:
        return tagged(response, await editor.create_tier(actor, **request.model_dump()))

    @routes.get("/{name}", summary="Read a tier")
    async def read(name: NameInPath, response: Response) -> TierRead:
        return tagged(response, await get_tier(editor, name))

    @routes.put("/{name}", summary="Replace the limits and quotas of a tier", responses=EDIT_ERRORS)
    async def replace(name: NameInPath, request: TierLimits, response: Response, actor: Actor, revisions: Revisions) -> TierRead:
        return await changed(response, actor, name, request.model_dump(), revisions)

    @routes.patch("/{name}", summary="Change the limits or quotas of a tier", responses=EDIT_ERRORS)
    async def change(name: NameInPath, request: TierPatch, response: Response, actor: Actor, revisions: Revisions) -> TierRead:
        fields = request.model_dump(exclude_unset=True)
        if not fields:
            raise BadRequest("there is nothing to change: send at least one field, such as quotas")
        return await changed(response, actor, name, fields, revisions)

    @routes.delete("/{name}", status_code=204, summary="Delete a tier with its rules", responses=EDIT_ERRORS)
    async def remove(name: NameInPath, actor: Actor, revisions: Revisions) -> None:
        await editor.delete_tier(actor, name, revisions)

    return routes
