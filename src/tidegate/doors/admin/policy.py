"""/admin/v1/policy: the whole policy in the policy file's own form."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from tidegate.catalog.editing import CatalogEditor
from tidegate.catalog.importing import export_policy, import_policy, import_warnings
from tidegate.catalog.policy_file import parse_policy, policy_warnings
from tidegate.catalog.policy_text import policy_text
from tidegate.doors.admin.common import Actor
from tidegate.doors.admin.forms import ImportTold
from tidegate.errors import BadRequest

_TOML = "application/toml"
_EXPORTED: dict[int | str, dict[str, Any]] = {
    200: {"description": "A policy file.", "content": {_TOML: {"schema": {"type": "string"}}}}
}
_IMPORTED: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A policy file.",
        "content": {
            _TOML: {"schema": {"type": "string"}, "example": '[[tiers]]\nname = "free"\nlimits = ["1000/day"]\n'},
        },
    }
}


def policy_routes(editor: CatalogEditor) -> APIRouter:
    """The routes of the whole policy.

    Args:
        editor: of the catalog.

    Returns:
        The routes.
    """
    routes = APIRouter(prefix="/policy", tags=["policy"])

    @routes.get("", summary="Write everything as a policy file", response_class=Response, responses=_EXPORTED)
    async def export(keys: Annotated[bool, Query(description="whether API keys are in it, by their digests")] = True) -> Response:
        text = policy_text(await export_policy(editor, with_keys=keys))
        return Response(text, media_type=_TOML, headers={"Cache-Control": "no-store"})

    @routes.post("", summary="Take a policy file into the catalog, in one step", openapi_extra=_IMPORTED)
    async def take(
        request: Request,
        actor: Actor,
        dry_run: Annotated[bool, Query(description="only show what would change")] = False,
        prune: Annotated[bool, Query(description="also remove rows that neither this text nor the policy file names")] = False,
    ) -> ImportTold:
        try:
            text = (await request.body()).decode()
            policy = parse_policy(text)
        except UnicodeDecodeError:
            raise BadRequest("the policy is not UTF-8: send the file as it is") from None
        changes = await import_policy(editor, actor, policy, dry_run=dry_run, prune=prune)
        warnings = [*policy_warnings(policy), *import_warnings(text, changes)]
        return ImportTold.model_validate({"dry_run": dry_run, "changes": changes, "warnings": warnings})

    return routes
