"""/admin/v1/explain."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query

from tidegate.admin.explain import explain_request
from tidegate.admin.models import Plain
from tidegate.admin.models.explain import ExplainRead
from tidegate.admin.rules import CatalogEditor
from tidegate.decision import MAX_COST, Check
from tidegate.doors.admin.common import AdminRouter, Exactly, Ip, KeyId
from tidegate.errors import BadRequest
from tidegate.gate.gate import Gate
from tidegate.policy.attributes import parse_subject
from tidegate.policy.paths import PathRules

Attributes = Annotated[
    str | None, Query(max_length=5000, description="attributes of the request, such as user=42, or org=acme&user=42"), Plain
]
Path = Annotated[str, Query(max_length=8192, description="path of the request, as the client sends it"), Plain]
Method = Annotated[str, Query(max_length=32), Plain]
Cost = Annotated[int, Query(ge=0, le=MAX_COST, description="units that the request costs")]


def explain_routes(editor: CatalogEditor, gate: Gate, paths: PathRules) -> AdminRouter:
    """The route of explanations."""
    routes = AdminRouter(tags=["usage"])

    @routes.get("/explain", summary="Explain which rule answers a request, and what is left to its caller; charges nothing")
    async def explain(
        path: Path = "/",
        method: Method = "GET",
        api_key_id: KeyId = None,
        ip: Ip = None,
        attributes: Attributes = None,
        tier: Exactly = None,
        cost: Cost = 1,
    ) -> ExplainRead:
        if tier is not None and api_key_id is not None:
            raise BadRequest("tier and api_key_id came together, and the key has a tier of its own: send one", field="tier")
        given = parse_subject(attributes) if attributes else None
        if given is not None and not given.keys().isdisjoint(("api_key", "ip")):
            raise BadRequest("api_key and ip are not attributes: send api_key_id and ip", field="attributes")
        check = Check.of(path, method, None, ip, cost, paths, attributes=given, tier=tier)
        return await explain_request(editor, gate, api_key_id, check)

    return routes
