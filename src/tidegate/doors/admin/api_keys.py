"""/admin/v1/api-keys."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query, Response

from tidegate.admin import api_keys
from tidegate.admin.key_import import KeyImportRequest, KeyImportResult, import_keys
from tidegate.admin.lists import key_row, list_keys
from tidegate.admin.models import (
    KeyCreate,
    KeyMade,
    KeyPage,
    KeyPatch,
    KeyRead,
    KeyRotated,
    OverridesRequest,
    RevokeRequest,
    RotateRequest,
)
from tidegate.admin.over_limit import used_up_by_key
from tidegate.admin.rules import CatalogEditor
from tidegate.doors.admin.common import EDIT_ERRORS, Actor, AdminRouter, After, Contains, Exactly, Limit, Revisions, tagged
from tidegate.errors import BadRequest
from tidegate.gate.gate import Gate

Status = Literal["active", "expired", "revoked"]
IdPrefix = Annotated[str | None, Query(pattern="^[0-9a-f]{1,24}$", description="filter: prefix of the id, 1 to 24 hex digits")]


def key_routes(editor: CatalogEditor, gate: Gate) -> AdminRouter:
    """The routes of API keys."""
    routes = AdminRouter(prefix="/api-keys", tags=["API keys"])

    async def changed(response: Response, actor: str, key_id: str, request: KeyPatch, revisions: Revisions) -> KeyRead:
        key = tagged(response, await api_keys.edit_key(editor, actor, key_id, request, revisions))
        changed_limits = request.model_fields_set & {"limits", "overrides"}
        return key.model_copy(update={"warnings": await used_up_by_key(editor, gate, key.id) if changed_limits else []})

    @routes.get("", summary="List API keys, by id")
    async def read_all(
        limit: Limit = 100,
        after: After = None,
        tier: Exactly = None,
        status: Status | None = None,
        name: Contains = None,
        id_prefix: IdPrefix = None,
        customer: Exactly = None,
    ) -> KeyPage:
        page = await list_keys(editor, limit, after, tier, status, name, id_prefix, customer)
        return KeyPage(items=page.items, next=page.next)

    @routes.post("", status_code=201, summary="Create an API key; only this response contains the key itself")
    async def create(request: KeyCreate, response: Response, actor: Actor) -> KeyMade:
        return tagged(_secret(response), await api_keys.create_key(editor, actor, request))

    @routes.post("/import", summary="Import API keys that another system issued, by digest")
    async def import_batch(given: KeyImportRequest, actor: Actor) -> KeyImportResult:
        return await import_keys(editor, actor, given)

    @routes.get("/{key_id}", summary="Read an API key's record")
    async def read(key_id: str, response: Response) -> KeyRead:
        return tagged(response, KeyRead.of_row(await key_row(editor, key_id)))

    @routes.patch("/{key_id}", summary="Change fields of an API key", responses=EDIT_ERRORS)
    async def change(key_id: str, request: KeyPatch, response: Response, actor: Actor, revisions: Revisions) -> KeyRead:
        if not request.model_fields_set:
            raise BadRequest("there is nothing to change: send at least one field, such as name")
        return await changed(response, actor, key_id, request, revisions)

    @routes.put("/{key_id}/overrides", summary="Replace the overrides of an API key", responses=EDIT_ERRORS)
    async def override(key_id: str, request: OverridesRequest, response: Response, actor: Actor, revisions: Revisions) -> KeyRead:
        return await changed(response, actor, key_id, KeyPatch(limits=request.limits, overrides=request.overrides), revisions)

    @routes.post("/{key_id}/revoke", summary="Revoke an API key permanently")
    async def revoke(key_id: str, request: RevokeRequest, response: Response, actor: Actor) -> KeyRead:
        return tagged(response, await api_keys.revoke_key(editor, actor, key_id, request))

    @routes.post("/{key_id}/rotate", status_code=201, summary="Rotate an API key; only this response contains the new key")
    async def rotate(key_id: str, response: Response, actor: Actor, request: RotateRequest | None = None) -> KeyRotated:
        grace_s = 0 if request is None else request.grace_s
        return tagged(_secret(response), await api_keys.rotate_key(editor, actor, key_id, grace_s))

    @routes.delete("/{key_id}", status_code=204, summary="Delete the record of a revoked or expired key", responses=EDIT_ERRORS)
    async def remove(key_id: str, actor: Actor, revisions: Revisions) -> None:
        await api_keys.delete_key(editor, actor, key_id, revisions)

    return routes


def _secret(response: Response) -> Response:
    response.headers["Cache-Control"] = "no-store"
    return response
