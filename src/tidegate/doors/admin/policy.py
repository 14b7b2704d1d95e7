"""/admin/v1/policy: the whole policy in the policy file's own form."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from tidegate.admin.import_export import export_policy, import_policy
from tidegate.admin.models import ImportRead
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.tokens import OPERATOR
from tidegate.doors.admin.common import Actor, Caller
from tidegate.doors.admin.guard import require_operator
from tidegate.doors.responses import encode
from tidegate.errors import BadRequest
from tidegate.policy.model import Policy
from tidegate.policy.toml_reader import parse_policy, policy_warnings
from tidegate.policy.toml_writer import policy_text

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
    # One text is read at a time: what is read takes up to 160 times its size in memory.
    reading = asyncio.Lock()

    @routes.get("", summary="Write everything as a policy file", response_class=Response, responses=_EXPORTED)
    async def export(
        caller: Caller,
        keys: Annotated[
            bool | None,
            Query(description="whether API keys are in it, by their digests; by default for operators, never for viewers"),
        ] = None,
    ) -> Response:
        if keys:
            require_operator(caller)
        with_keys = caller.role == OPERATOR if keys is None else keys
        text = await asyncio.to_thread(policy_text, await export_policy(editor, with_keys=with_keys))
        return Response(text, media_type=_TOML, headers={"Cache-Control": "no-store"})

    @routes.post(
        "", summary="Take a policy file into the catalog, in one step", response_model=ImportRead, openapi_extra=_IMPORTED
    )
    async def take(
        request: Request,
        actor: Actor,
        dry_run: Annotated[bool, Query(description="only show what would change")] = False,
        prune: Annotated[bool, Query(description="also remove rows that neither this text nor the policy file names")] = False,
    ) -> Response:
        body = await request.body()
        async with reading:
            policy, warnings = await asyncio.to_thread(_read, body)
        changes = await import_policy(editor, actor, policy, dry_run=dry_run, prune=prune)
        # Not by way of the model, which would hold the event loop for as long as it looks at thousands of changes.
        return Response(encode({"dry_run": dry_run, "changes": changes, "warnings": warnings}), media_type="application/json")

    return routes


def _read(body: bytes) -> tuple[Policy, list[str]]:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise BadRequest("the policy is not UTF-8: send the file as it is") from None
    policy = parse_policy(text)
    return policy, policy_warnings(policy)
