"""/admin/v1/tokens, for operators."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Response

from tidegate.admin import tokens
from tidegate.admin.lists import list_tokens
from tidegate.admin.models import TokenCreate, TokenMade, TokenPage, TokenRead
from tidegate.admin.rules import CatalogEditor
from tidegate.doors.admin.common import OPERATORS_ONLY, Actor, AdminRouter, After, Limit
from tidegate.timestamps import parse_timestamp

TokenId = Annotated[int, Path(ge=1, le=2**53)]


def token_routes(editor: CatalogEditor) -> AdminRouter:
    """The routes of tokens."""
    routes = AdminRouter(prefix="/tokens", tags=["tokens"], dependencies=[OPERATORS_ONLY])

    @routes.get("", summary="List tokens, by id")
    async def read_all(limit: Limit = 100, after: After = None) -> TokenPage:
        page = await list_tokens(editor, limit, after)
        return TokenPage(items=page.items, next=page.next)

    @routes.post("", status_code=201, summary="Create a token; only this response contains the token itself")
    async def create(request: TokenCreate, response: Response, actor: Actor) -> TokenMade:
        expires_at_us = None if request.expires_at is None else parse_timestamp(request.expires_at, "expires_at")
        response.headers["Cache-Control"] = "no-store"
        return await tokens.create_token(editor, actor, request.name, request.role, expires_at_us)

    @routes.delete("/{token_id}", summary="Revoke a token; its record is kept")
    async def revoke(token_id: TokenId, actor: Actor) -> TokenRead:
        return await tokens.revoke_token(editor, actor, token_id)

    return routes
