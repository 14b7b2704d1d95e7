"""/admin/v1/customers."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Response

from tidegate.admin.customers import create_customer, delete_customer, edit_customer, get_customer, list_customers
from tidegate.admin.models import CustomerCreate, CustomerPage, CustomerPatch, CustomerRead, Plain
from tidegate.admin.rules import CatalogEditor
from tidegate.doors.admin.common import EDIT_ERRORS, Actor, AdminRouter, After, Exactly, Limit, Revisions, tagged
from tidegate.errors import BadRequest

NameInPath = Annotated[str, Path(max_length=64), Plain]


def customer_routes(editor: CatalogEditor) -> AdminRouter:
    """The routes of customers."""
    routes = AdminRouter(prefix="/customers", tags=["customers"])

    @routes.get("", summary="List customers, by name")
    async def read_all(
        limit: Limit = 100,
        after: After = None,
        tier: Exactly = None,
        external_id: Exactly = None,
        name_prefix: Exactly = None,
    ) -> CustomerPage:
        page = await list_customers(editor, limit, after, tier, external_id, name_prefix)
        return CustomerPage(items=page.items, next=page.next)

    @routes.post("", status_code=201, summary="Create a customer")
    async def create(request: CustomerCreate, response: Response, actor: Actor) -> CustomerRead:
        return tagged(response, await create_customer(editor, actor, request))

    @routes.get("/{name}", summary="Read a customer")
    async def read(name: NameInPath, response: Response) -> CustomerRead:
        return tagged(response, await get_customer(editor, name))

    @routes.patch("/{name}", summary="Change fields of a customer", responses=EDIT_ERRORS)
    async def change(
        name: NameInPath, request: CustomerPatch, response: Response, actor: Actor, revisions: Revisions
    ) -> CustomerRead:
        if not request.model_fields_set:
            raise BadRequest("there is nothing to change: send at least one field, such as tier")
        return tagged(response, await edit_customer(editor, actor, name, request, revisions))

    @routes.delete("/{name}", status_code=204, summary="Delete a customer without active API keys", responses=EDIT_ERRORS)
    async def remove(name: NameInPath, actor: Actor, revisions: Revisions) -> None:
        await delete_customer(editor, actor, name, revisions)

    return routes
