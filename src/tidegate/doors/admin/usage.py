"""/admin/v1/usage and /admin/v1/counters/reset."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from fastapi import Query

from tidegate.admin.models import Plain, ResetRead, ResetRequest, UsageRead
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import NotFound
from tidegate.admin.usage import customer_usage, key_usage, reset_customer, reset_key, subject_of_key, subject_usage
from tidegate.decision import Usage
from tidegate.doors.admin.common import Actor, AdminRouter, Exactly, Ip, KeyId, SubjectText
from tidegate.doors.responses import usage_body
from tidegate.errors import BadRequest, MissingApiKey
from tidegate.gate.gate import Gate
from tidegate.ip_addresses import client_of
from tidegate.timestamps import now_us
from tidegate.violations.queries import DAY_US, ViolationFilter, blocked_total

MAX_TARGET: Final = 400
"""Characters of a target in the audit log."""

CustomerOf = Annotated[str | None, Query(max_length=64, description="name of a customer"), Plain]


class UsageOf(msgspec.Struct, frozen=True):
    """Whose usage is read: a key with or without an address, an address, a customer, or a subject of attributes."""

    api_key_id: str | None = None
    ip: str | None = None
    subject: str | None = None
    customer: str | None = None
    tier: str | None = None


async def read_usage(editor: CatalogEditor, gate: Gate, of: UsageOf) -> UsageRead:
    """The usage of one caller.

    Raises:
        BadRequest: if it is not one caller, or a value is not valid.
        NotFound: if there is no such key or customer, or the policy has no tier for such a caller.
        CatalogUnavailable: if the catalog does not answer.
    """
    found, subject = await _usage_and_subject(editor, gate, of)
    now = now_us()
    blocked = await blocked_total(editor.catalog.database, ViolationFilter(now - DAY_US, now + 1, subject=subject))
    body = msgspec.to_builtins(usage_body(found))
    for read, rule in zip(body["rules"], found.rules, strict=True):
        read["holds"] = rule.holds
    return UsageRead.model_validate({**body, "blocked_24h": blocked})


async def _usage_and_subject(editor: CatalogEditor, gate: Gate, of: UsageOf) -> tuple[Usage, str]:
    if of.api_key_id is None and of.ip is None and of.subject is None and of.customer is None:
        raise BadRequest("the caller is missing: send api_key_id, ip, or both; or customer; or subject, such as user=42")
    if of.tier is not None and ((of.subject is None and of.customer is None) or of.api_key_id is not None):
        raise BadRequest("tier is for a subject of attributes or a customer only: omit it", field="tier")
    if of.customer is not None:
        if any(each is not None for each in (of.api_key_id, of.ip, of.subject)):
            raise BadRequest("customer came together with another subject: send one of them", field="customer")
        return await customer_usage(editor, gate, of.customer, of.tier)
    if of.subject is not None:
        if of.api_key_id is not None:
            raise BadRequest("api_key_id and subject are two subjects: send one of them")
        return await subject_usage(gate, of.subject, of.ip, of.tier)
    if of.api_key_id is not None:
        return await key_usage(editor, gate, of.api_key_id, of.ip), await subject_of_key(editor, of.api_key_id)
    try:
        return await gate.usage(ip=of.ip, count_holds=True), f"i:{client_of(of.ip or '')}"
    except MissingApiKey:
        raise NotFound("there is no anonymous tier, so clients without a key have no quota") from None


async def reset_subject(editor: CatalogEditor, gate: Gate, actor: str, request: ResetRequest) -> ResetRead:
    """Reset the counters of one subject, with an entry in the audit log.

    Raises:
        BadRequest: if it is not one subject, or a value is not valid.
        NotFound: if there is no such key, customer or tier.
        CatalogUnavailable: if the catalog does not answer.
        StoreUnavailable: if the counter store fails; some may have been reset.
    """
    named = request.model_dump(exclude_none=True)
    if request.namespace is not None:
        if request.subject is None or len(named) != 2:
            raise BadRequest("a reset in a namespace needs subject, and nothing else: {'namespace', 'subject'}")
        await gate.request_limits.reset(request.namespace, request.subject)
        target = f"namespace {request.namespace} {request.subject}"[:MAX_TARGET]
        await editor.record(actor, "reset", "counters", target, {"reset": 1})
        return ResetRead(reset=1)
    if len(named) != 1:
        raise BadRequest("a reset needs exactly one of api_key_id, ip, tier, subject and customer")
    if request.api_key_id is not None:
        count = await reset_key(editor, gate, request.api_key_id)
    elif request.customer is not None:
        count = await reset_customer(editor, gate, request.customer)
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


def usage_routes(editor: CatalogEditor, gate: Gate) -> AdminRouter:
    """The routes of usage and counters."""
    routes = AdminRouter(tags=["usage"])

    @routes.get("/usage", summary="Read the remaining quota of a key, a customer, or a client without a key; charges nothing")
    async def usage(
        api_key_id: KeyId = None,
        ip: Ip = None,
        subject: SubjectText = None,
        customer: CustomerOf = None,
        tier: Exactly = None,
    ) -> UsageRead:
        return await read_usage(editor, gate, UsageOf(api_key_id, ip, subject, customer, tier))

    @routes.post("/counters/reset", summary="Reset the counters of a key, a customer, a client or a tier")
    async def reset(request: ResetRequest, actor: Actor) -> ResetRead:
        return await reset_subject(editor, gate, actor, request)

    return routes
