"""/admin/v1/namespaces, and /admin/v1/callers, which is read only: a policy has it."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Response

from tidegate.admin.models import Plain
from tidegate.admin.models.namespaces import (
    CallersRead,
    NamespaceCreate,
    NamespaceFields,
    NamespacePage,
    NamespacePatch,
    NamespaceRead,
)
from tidegate.admin.namespaces import (
    create_namespace,
    delete_namespace,
    edit_namespace,
    get_namespace,
    list_namespaces,
    read_callers,
)
from tidegate.admin.rules import CatalogEditor
from tidegate.doors.admin.common import EDIT_ERRORS, Actor, AdminRouter, After, Contains, Limit, Revisions, tagged
from tidegate.errors import BadRequest

NameInPath = Annotated[str, Path(max_length=64), Plain]


def namespace_routes(editor: CatalogEditor) -> AdminRouter:
    """The routes of namespaces."""
    routes = AdminRouter(prefix="/namespaces", tags=["namespaces"])

    @routes.get("", summary="List namespaces, by name")
    async def read_all(limit: Limit = 100, after: After = None, name: Contains = None) -> NamespacePage:
        page = await list_namespaces(editor, limit, after, name)
        return NamespacePage(items=page.items, next=page.next)

    @routes.post("", status_code=201, summary="Create a namespace")
    async def create(request: NamespaceCreate, response: Response, actor: Actor) -> NamespaceRead:
        return tagged(response, await create_namespace(editor, actor, request.name, request.model_dump(exclude={"name"})))

    @routes.get("/{name}", summary="Read a namespace")
    async def read(name: NameInPath, response: Response) -> NamespaceRead:
        return tagged(response, await get_namespace(editor, name))

    @routes.put("/{name}", summary="Replace a namespace; omitted fields get their defaults", responses=EDIT_ERRORS)
    async def replace(
        name: NameInPath, request: NamespaceFields, response: Response, actor: Actor, revisions: Revisions
    ) -> NamespaceRead:
        return tagged(response, await edit_namespace(editor, actor, name, request.model_dump(), revisions))

    @routes.patch("/{name}", summary="Change fields of a namespace", responses=EDIT_ERRORS)
    async def change(
        name: NameInPath, request: NamespacePatch, response: Response, actor: Actor, revisions: Revisions
    ) -> NamespaceRead:
        fields = request.model_dump(exclude_none=True)
        if not fields:
            raise BadRequest("there is nothing to change: send at least one field, such as limits")
        return tagged(response, await edit_namespace(editor, actor, name, fields, revisions))

    @routes.delete("/{name}", status_code=204, summary="Delete a namespace", responses=EDIT_ERRORS)
    async def remove(name: NameInPath, actor: Actor, revisions: Revisions) -> None:
        await delete_namespace(editor, actor, name, revisions)

    return routes


def caller_routes(editor: CatalogEditor) -> AdminRouter:
    """The route of what the policy says of callers without an API key."""
    routes = AdminRouter(prefix="/callers", tags=["policy"])

    @routes.get("", summary="Read [anonymous], [callers], [attributes] and [jwt]; change them with a policy")
    async def read() -> CallersRead:
        return await read_callers(editor)

    return routes
