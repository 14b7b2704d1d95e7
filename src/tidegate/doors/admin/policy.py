"""/admin/v1/policy: the policy in the format of the policy file."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import Query, Request, Response

from tidegate.admin.import_export import export_policy, import_policy
from tidegate.admin.models import ImportRead
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.tokens import OPERATOR
from tidegate.doors.admin.common import Actor, AdminRouter, Caller
from tidegate.doors.admin.guard import require_operator
from tidegate.doors.responses import encode
from tidegate.errors import BadRequest
from tidegate.policy.model import Policy
from tidegate.policy.toml_reader import parse_policy, policy_warnings
from tidegate.policy.toml_writer import policy_text

_TOML = "application/toml"
_EXPORT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "A policy file.", "content": {_TOML: {"schema": {"type": "string"}}}}
}
_IMPORT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A policy file.",
        "content": {
            _TOML: {"schema": {"type": "string"}, "example": '[[tiers]]\nname = "free"\nlimits = ["1000/day"]\n'},
        },
    }
}


def policy_routes(editor: CatalogEditor) -> AdminRouter:
    """The routes of the policy."""
    routes = AdminRouter(prefix="/policy", tags=["policy"])

    @routes.get("", summary="Export everything as a policy file", response_class=Response, responses=_EXPORT_RESPONSES)
    async def export(
        caller: Caller,
        keys: Annotated[
            bool | None,
            Query(
                description="whether to include API keys, as digests; default: true for operators; viewers cannot include them"
            ),
        ] = None,
    ) -> Response:
        if keys:
            require_operator(caller)
        with_keys = caller.role == OPERATOR if keys is None else keys
        text = await asyncio.to_thread(policy_text, await export_policy(editor, with_keys=with_keys))
        return Response(text, media_type=_TOML, headers={"Cache-Control": "no-store"})

    @routes.post(
        "",
        summary="Import a policy file into the catalog, in one transaction",
        response_model=ImportRead,
        openapi_extra=_IMPORT_BODY,
    )
    async def take(
        request: Request,
        actor: Actor,
        dry_run: Annotated[bool, Query(description="return the changes without making them")] = False,
        prune: Annotated[
            bool, Query(description="also delete rows that are neither in this text nor in the policy file")
        ] = False,
    ) -> Response:
        body = await request.body()
        async with editor.parsing:
            policy, warnings = await asyncio.to_thread(_read, body)
        changes = await import_policy(editor, actor, policy, dry_run=dry_run, prune=prune)
        # Not through the model, whose validation of thousands of changes would block the event loop.
        return Response(encode({"dry_run": dry_run, "changes": changes, "warnings": warnings}), media_type="application/json")

    return routes


def _read(body: bytes) -> tuple[Policy, list[str]]:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise BadRequest("the policy is not UTF-8: send the file as it is") from None
    policy = parse_policy(text)
    return policy, policy_warnings(policy)
