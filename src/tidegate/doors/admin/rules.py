"""/admin/v1/rate-limit-rules."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Response

from tidegate.admin.lists import get_rule, list_rules
from tidegate.admin.models import RuleCreate, RuleFields, RulePage, RulePatch, RuleRead
from tidegate.admin.over_limit import used_up_in_tier
from tidegate.admin.rules import CatalogEditor
from tidegate.doors.admin.common import EDIT_ERRORS, Actor, AdminRouter, After, Contains, Exactly, Limit, Revisions, tagged
from tidegate.errors import BadRequest
from tidegate.gate.gate import Gate

RuleId = Annotated[int, Path(ge=1, le=2**53)]


def rule_routes(editor: CatalogEditor, gate: Gate) -> AdminRouter:
    """The routes of rules."""
    routes = AdminRouter(prefix="/rate-limit-rules", tags=["rules"])

    async def answer(response: Response, rule: RuleRead) -> RuleRead:
        warnings = rule.warnings + await used_up_in_tier(editor, gate, rule.tier, rule.name)
        return tagged(response, rule).model_copy(update={"warnings": warnings})

    @routes.get("", summary="List rules, by id")
    async def read_all(
        limit: Limit = 100, after: After = None, tier: Exactly = None, endpoint: Contains = None, name: Contains = None
    ) -> RulePage:
        page = await list_rules(editor, limit, after, tier, endpoint, name)
        return RulePage(items=page.items, next=page.next)

    @routes.post("", status_code=201, summary="Add a rule to a tier")
    async def create(request: RuleCreate, response: Response, actor: Actor) -> RuleRead:
        fields = request.model_dump(exclude={"tier"})
        fields["name"] = request.name or ""
        return await answer(response, await editor.create_rule(actor, request.tier, fields))

    @routes.get("/{rule_id}", summary="Read a rule")
    async def read(rule_id: RuleId, response: Response) -> RuleRead:
        return tagged(response, await get_rule(editor, rule_id))

    @routes.put("/{rule_id}", summary="Replace a rule; omitted fields get their defaults", responses=EDIT_ERRORS)
    async def replace(rule_id: RuleId, request: RuleFields, response: Response, actor: Actor, revisions: Revisions) -> RuleRead:
        fields = {**request.model_dump(), "name": request.name or ""}
        return await answer(response, await editor.edit_rule(actor, rule_id, fields, revisions, replace=True))

    @routes.patch("/{rule_id}", summary="Change fields of a rule", responses=EDIT_ERRORS)
    async def change(rule_id: RuleId, request: RulePatch, response: Response, actor: Actor, revisions: Revisions) -> RuleRead:
        fields = request.model_dump(exclude_unset=True)
        if not fields:
            raise BadRequest("there is nothing to change: send at least one field, such as limits")
        if "name" in fields:
            fields["name"] = fields["name"] or ""
        return await answer(response, await editor.edit_rule(actor, rule_id, fields, revisions))

    @routes.delete("/{rule_id}", status_code=204, summary="Delete a rule", responses=EDIT_ERRORS)
    async def remove(rule_id: RuleId, actor: Actor, revisions: Revisions) -> None:
        await editor.delete_rule(actor, rule_id, revisions)

    return routes
