"""/admin/v1/usage and /admin/v1/counters/reset."""

from __future__ import annotations

from typing import Final

import msgspec
from fastapi import APIRouter

from tidegate.admin.models import ResetRead, ResetRequest, UsageRead
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import NotFound
from tidegate.admin.usage import key_usage, reset_key, subject_of_key, subject_usage
from tidegate.decision import client_of
from tidegate.doors.admin.common import Actor, Exactly, Ip, KeyId, SubjectText
from tidegate.doors.responses import usage_body
from tidegate.errors import BadRequest, MissingApiKey
from tidegate.gate.gate import Gate
from tidegate.timestamps import now_us
from tidegate.violations.queries import DAY_US, ViolationFilter, blocked_total

MAX_TARGET: Final = 400
"""Characters of a target in the audit log."""


def usage_routes(editor: CatalogEditor, gate: Gate) -> APIRouter:
    """The routes of usage and counters."""
    routes = APIRouter(tags=["usage"])

    @routes.get("/usage", summary="Read the remaining quota of a key, or of a client without one; charges nothing")
    async def usage(api_key_id: KeyId = None, ip: Ip = None, subject: SubjectText = None, tier: Exactly = None) -> UsageRead:
        if api_key_id is None and ip is None and subject is None:
            raise BadRequest("the caller is missing: send api_key_id, ip, or both; or subject, such as user=42")
        if tier is not None and (subject is None or api_key_id is not None):
            raise BadRequest("tier is for a subject of attributes only: omit it", field="tier")
        if subject is not None:
            if api_key_id is not None:
                raise BadRequest("api_key_id and subject are two subjects: send one of them")
            found, subject = await subject_usage(gate, subject, ip, tier)
        elif api_key_id is not None:
            found = await key_usage(editor, gate, api_key_id, ip)
            subject = await subject_of_key(editor, api_key_id)
        else:
            try:
                found = await gate.usage(ip=ip)
            except MissingApiKey:
                raise NotFound("there is no anonymous tier, so clients without a key have no quota") from None
            subject = f"i:{client_of(ip or '')}"
        now = now_us()
        blocked = await blocked_total(editor.catalog.database, ViolationFilter(now - DAY_US, now + 1, subject=subject))
        return UsageRead.model_validate({**msgspec.to_builtins(usage_body(found)), "blocked_24h": blocked})

    @routes.post("/counters/reset", summary="Reset the counters of a key, a client or a tier")
    async def reset(request: ResetRequest, actor: Actor) -> ResetRead:
        named = request.model_dump(exclude_none=True)
        if request.namespace is not None:
            if request.subject is None or len(named) != 2:
                raise BadRequest("a reset in a namespace needs subject, and nothing else: {'namespace', 'subject'}")
            await gate.request_limits.reset(request.namespace, request.subject)
            target = f"namespace {request.namespace} {request.subject}"[:MAX_TARGET]
            await editor.record(actor, "reset", "counters", target, {"reset": 1})
            return ResetRead(reset=1)
        if len(named) != 1:
            raise BadRequest("a reset needs exactly one of api_key_id, ip, tier and subject")
        if request.api_key_id is not None:
            count = await reset_key(editor, gate, request.api_key_id)
        elif request.ip is not None:
            count = await gate.reset(ip=request.ip)
        elif request.subject is not None:
            count = await gate.reset(subject=request.subject)
        else:
            if await gate.catalog.tier(request.tier or "") is None:
                raise NotFound(f"there is no tier {request.tier!r}: see GET /admin/v1/tiers")
            count = await gate.reset(tier=request.tier)
        ((kind, target),) = named.items()
        await editor.record(actor, "reset", "counters", f"{kind} {target}"[:MAX_TARGET], {"reset": count})
        return ResetRead(reset=count)

    return routes
