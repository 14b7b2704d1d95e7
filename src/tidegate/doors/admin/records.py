"""/admin/v1/usage, /counters/reset, /violations and /audit-log: what happened, and what is left."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Query

from tidegate.admin.lists import list_audit
from tidegate.admin.models import (
    AuditPage,
    Moment,
    Plain,
    ResetRead,
    ResetRequest,
    TopRead,
    UsageRead,
    ViolationPage,
)
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import NotFound
from tidegate.admin.usage import key_usage, reset_key, subject_of_key
from tidegate.decision import client_of
from tidegate.doors.admin.common import Actor, After, Exactly, Limit
from tidegate.doors.responses import usage_body
from tidegate.errors import BadRequest, MissingApiKey
from tidegate.gate.gate import Gate
from tidegate.timestamps import now_us, parse_timestamp
from tidegate.violations.queries import DAY_US, Blocked, blocked_total, list_violations, top_violators

By = Literal["subject", "rule", "tier"]
KeyId = Annotated[str | None, Query(max_length=24, description="id of an API key"), Plain]
Ip = Annotated[str | None, Query(max_length=45, description="IPv4 or IPv6 address of a client"), Plain]
Most = Annotated[int, Query(ge=1, le=100, description="at most so many items")]


def record_routes(editor: CatalogEditor, gate: Gate) -> APIRouter:
    """The routes of records."""
    routes = APIRouter()

    @routes.get("/usage", tags=["usage"], summary="What is left to a key, or to a client without one; charges nothing")
    async def usage(api_key_id: KeyId = None, ip: Ip = None) -> UsageRead:
        if api_key_id is None and ip is None:
            raise BadRequest("nobody is named: give api_key_id, ip, or both")
        if api_key_id is not None:
            found = await key_usage(editor, gate, api_key_id, ip)
            subject = await subject_of_key(editor, api_key_id)
        else:
            try:
                found = await gate.usage(ip=ip)
            except MissingApiKey:
                raise NotFound("there is no anonymous tier, so nothing is left to a client without a key") from None
            subject = f"i:{client_of(ip or '')}"
        now = now_us()
        blocked = await blocked_total(editor.catalog.database, Blocked(now - DAY_US, now + 1, subject=subject))
        return UsageRead.model_validate({**msgspec.to_builtins(usage_body(found)), "blocked_24h": blocked})

    @routes.post("/counters/reset", tags=["usage"], summary="Forget what a key, a client or a tier consumed")
    async def reset(given: ResetRequest, actor: Actor) -> ResetRead:
        named = given.model_dump(exclude_none=True)
        if len(named) != 1:
            raise BadRequest("a reset needs exactly one of api_key_id, ip and tier")
        if given.api_key_id is not None:
            count = await reset_key(editor, gate, given.api_key_id)
        elif given.ip is not None:
            count = await gate.reset(ip=given.ip)
        else:
            if await gate.catalog.tier(given.tier or "") is None:
                raise NotFound(f"there is no tier {given.tier!r}: see GET /admin/v1/tiers")
            count = await gate.reset(tier=given.tier)
        ((kind, target),) = named.items()
        await editor.record(actor, "reset", "counters", f"{kind} {target}", {"reset": count})
        return ResetRead(reset=count)

    @routes.get("/violations", tags=["violations"], summary="Who was blocked in which minute, the newest first")
    async def violations(
        limit: Limit = 100,
        after: After = None,
        since: Moment | None = None,
        until: Moment | None = None,
        tier: Exactly = None,
        rule: Exactly = None,
        api_key_id: KeyId = None,
        ip: Ip = None,
    ) -> ViolationPage:
        page = await list_violations(
            editor.catalog.database, limit, after, await _blocked(editor, since, until, tier, rule, api_key_id, ip)
        )
        return ViolationPage.model_validate({"items": page.items, "next": page.next})

    @routes.get("/violations/top", tags=["violations"], summary="Who was blocked most, the most first")
    async def top(
        limit: Most = 10,
        by: By = "subject",
        since: Moment | None = None,
        until: Moment | None = None,
        tier: Exactly = None,
        rule: Exactly = None,
        api_key_id: KeyId = None,
        ip: Ip = None,
    ) -> TopRead:
        items = await top_violators(
            editor.catalog.database, limit, by, await _blocked(editor, since, until, tier, rule, api_key_id, ip)
        )
        return TopRead.model_validate({"items": items})

    @routes.get("/audit-log", tags=["audit log"], summary="Who changed what from what to what, the newest first")
    async def audit_log(
        limit: Limit = 100, after: After = None, kind: Exactly = None, target: Exactly = None, actor: Exactly = None
    ) -> AuditPage:
        page = await list_audit(editor, limit, after, kind, target, actor)
        return AuditPage(items=page.items, next=page.next)

    return routes


async def _blocked(
    editor: CatalogEditor,
    since: str | None,
    until: str | None,
    tier: str | None,
    rule: str | None,
    api_key_id: str | None,
    ip: str | None,
) -> Blocked:
    """The violations meant; of the last 24 h where no time is given."""
    if api_key_id is not None and ip is not None:
        raise BadRequest("api_key_id and ip are two subjects: give one of them")
    until_us = now_us() + 1 if until is None else parse_timestamp(until, "until")
    since_us = until_us - DAY_US if since is None else parse_timestamp(since, "since")
    if since_us >= until_us:
        raise BadRequest("since is not before until: swap the two")
    if api_key_id is not None:
        subject: str | None = await subject_of_key(editor, api_key_id)
    else:
        subject = None if ip is None else f"i:{client_of(ip)}"
    return Blocked(since_us, until_us, tier, rule, subject)
