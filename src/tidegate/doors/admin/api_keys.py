"""/admin/v1/api-keys."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query, Response
from pydantic import BaseModel

from tidegate.admin import api_keys as editing_keys
from tidegate.admin.api_keys import KeyFields
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
from tidegate.admin.records import key_form
from tidegate.admin.rules import CatalogEditor
from tidegate.doors.admin.common import EDIT_ERRORS, Actor, After, Contains, Exactly, Limit, SeenRevisions, tagged
from tidegate.errors import BadRequest
from tidegate.gate.gate import Gate
from tidegate.timestamps import parse_timestamp

Status = Literal["active", "expired", "revoked"]
IdPrefix = Annotated[
    str | None, Query(pattern="^[0-9a-f]{1,24}$", description="only those whose ids begin with this, 1 to 24 hex digits")
]


def key_routes(editor: CatalogEditor, gate: Gate) -> APIRouter:
    """The routes of API keys.

    Args:
        editor: of the catalog.
        gate: what counts, to warn of limits that are used up.

    Returns:
        The routes.
    """
    routes = APIRouter(prefix="/api-keys", tags=["API keys"])

    async def changed(response: Response, actor: str, key_id: str, fields: KeyFields, seen: Any) -> KeyRead:
        form = tagged(response, await editing_keys.edit_key(editor, actor, key_id, fields, seen))
        warned = fields.limits is not msgspec.UNSET or fields.overrides is not msgspec.UNSET
        warnings = await used_up_by_key(editor, gate, form["id"]) if warned else []
        return KeyRead.model_validate({**form, "warnings": warnings})

    @routes.get("", summary="List API keys, by id")
    async def read_all(
        limit: Limit = 100,
        after: After = None,
        tier: Exactly = None,
        status: Status | None = None,
        name: Contains = None,
        id_prefix: IdPrefix = None,
    ) -> KeyPage:
        page = await list_keys(editor, limit, after, tier, status, name, id_prefix)
        return KeyPage.model_validate({"items": page.items, "next": page.next})

    @routes.post("", status_code=201, summary="Make an API key; the key itself is told this once")
    async def create(given: KeyCreate, response: Response, actor: Actor) -> KeyMade:
        api_key, form = await editing_keys.create_key(editor, actor, _fields(given, set(KeyCreate.model_fields)))
        return KeyMade.model_validate({**tagged(_secret(response), form), "api_key": api_key})

    @routes.get("/{key_id}", summary="Read an API key's record")
    async def read(key_id: str, response: Response) -> KeyRead:
        return KeyRead.model_validate(tagged(response, key_form(await key_row(editor, key_id))))

    @routes.patch("/{key_id}", summary="Change fields of an API key", responses=EDIT_ERRORS)
    async def change(key_id: str, given: KeyPatch, response: Response, actor: Actor, seen: SeenRevisions) -> KeyRead:
        if not given.model_fields_set:
            raise BadRequest("there is nothing to change: name at least one field, such as name")
        return await changed(response, actor, key_id, _fields(given, given.model_fields_set), seen)

    @routes.put("/{key_id}/overrides", summary="Give an API key limits of its own", responses=EDIT_ERRORS)
    async def override(key_id: str, given: OverridesRequest, response: Response, actor: Actor, seen: SeenRevisions) -> KeyRead:
        return await changed(response, actor, key_id, _fields(given, set(OverridesRequest.model_fields)), seen)

    @routes.post("/{key_id}/revoke", summary="Revoke an API key, for good")
    async def revoke(key_id: str, given: RevokeRequest, response: Response, actor: Actor) -> KeyRead:
        return KeyRead.model_validate(tagged(response, await editing_keys.revoke_key(editor, actor, key_id, given.reason)))

    @routes.post("/{key_id}/rotate", status_code=201, summary="Replace an API key; the new one is told this once")
    async def rotate(key_id: str, response: Response, actor: Actor, given: RotateRequest | None = None) -> KeyRotated:
        grace_s = 0 if given is None else given.grace_s
        api_key, form, old = await editing_keys.rotate_key(editor, actor, key_id, grace_s)
        return KeyRotated.model_validate({**tagged(_secret(response), form), "api_key": api_key, "replaces": old})

    @routes.delete("/{key_id}", status_code=204, summary="Remove the record of a revoked or expired key", responses=EDIT_ERRORS)
    async def remove(key_id: str, actor: Actor, seen: SeenRevisions) -> None:
        await editing_keys.delete_key(editor, actor, key_id, seen)

    return routes


def _secret(response: Response) -> Response:
    response.headers["Cache-Control"] = "no-store"
    return response


def _fields(given: BaseModel, named: set[str]) -> KeyFields:
    values: dict[str, Any] = given.model_dump(include=named)
    if values.get("expires_at") is not None:
        values["expires_at_us"] = parse_timestamp(values["expires_at"], "expires_at")
    elif "expires_at" in values:
        values["expires_at_us"] = None
    values.pop("expires_at", None)
    if "overrides" in values:
        values["overrides"] = [(each["rule"], each["limits"]) for each in values["overrides"]]
    return KeyFields(**values)
