"""/admin/v1/caller-tokens, for operators."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Response

from tidegate.admin import caller_tokens
from tidegate.admin.caller_token_models import (
    CallerTokenCreate,
    CallerTokenMade,
    CallerTokenPage,
    CallerTokenRead,
    CallerTokenRotated,
)
from tidegate.admin.models import RotateRequest
from tidegate.admin.rules import CatalogEditor
from tidegate.doors.admin.common import OPERATORS_ONLY, Actor, AdminRouter, After, Limit
from tidegate.timestamps import parse_timestamp

TokenId = Annotated[int, Path(ge=1, le=2**53)]


def caller_token_routes(editor: CatalogEditor) -> AdminRouter:
    """The routes of tokens of gateways and back ends."""
    routes = AdminRouter(prefix="/caller-tokens", tags=["caller tokens"], dependencies=[OPERATORS_ONLY])

    @routes.get("", summary="List the tokens of gateways and back ends, by id")
    async def read_all(limit: Limit = 100, after: After = None) -> CallerTokenPage:
        page = await caller_tokens.list_caller_tokens(editor, limit, after)
        return CallerTokenPage(items=page.items, next=page.next)

    @routes.post("", status_code=201, summary="Create a token for the data plane; the token itself is in this response only")
    async def create(given: CallerTokenCreate, response: Response, actor: Actor) -> CallerTokenMade:
        expires_at_us = None if given.expires_at is None else parse_timestamp(given.expires_at, "expires_at")
        response.headers["Cache-Control"] = "no-store"
        return await caller_tokens.create_caller_token(editor, actor, given.name, given.scopes, expires_at_us)

    @routes.post("/{token_id}/rotate", status_code=201, summary="Replace a token by a new one with its name, scopes and expiry")
    async def rotate(
        token_id: TokenId, response: Response, actor: Actor, given: RotateRequest | None = None
    ) -> CallerTokenRotated:
        grace_s = 0 if given is None else given.grace_s
        response.headers["Cache-Control"] = "no-store"
        return await caller_tokens.rotate_caller_token(editor, actor, token_id, grace_s)

    @routes.delete("/{token_id}", summary="Revoke a token; its record stays")
    async def revoke(token_id: TokenId, actor: Actor) -> CallerTokenRead:
        return await caller_tokens.revoke_caller_token(editor, actor, token_id)

    return routes
