"""/admin/v1/violations and /admin/v1/audit-log."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from fastapi import Depends, Query

from tidegate.admin.lists import list_audit
from tidegate.admin.models import AuditPage, Timestamp, TopRead, ViolationPage, ViolationRead, ViolatorRead
from tidegate.admin.models.base import Plain
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.usage import attribute_names, attribute_subject_text, subject_of_key
from tidegate.doors.admin.common import AdminRouter, After, Exactly, Ip, KeyId, Limit, SubjectText
from tidegate.errors import BadRequest
from tidegate.ip_addresses import client_of
from tidegate.timestamps import now_us, parse_timestamp
from tidegate.violations.queries import DAY_US, ViolationFilter, list_violations, top_violators

By = Literal["subject", "rule", "tier", "customer"]
ModeOf = Annotated[
    Literal["enforce", "shadow"], Query(description="shadow: what shadow rules would have blocked, in place of what was blocked")
]
AttributeNames = Annotated[
    str | None,
    Query(max_length=300, description="only subjects of exactly these attributes, such as user, or org,user for both"),
    Plain,
]
TopLimit = Annotated[int, Query(ge=1, le=100, description="maximum number of items")]


def record_routes(editor: CatalogEditor) -> AdminRouter:
    """The routes of violations and of the audit log."""
    routes = AdminRouter()
    database = editor.catalog.database

    async def violation_filter(
        since: Timestamp | None = None,
        until: Timestamp | None = None,
        tier: Exactly = None,
        rule: Exactly = None,
        api_key_id: KeyId = None,
        ip: Ip = None,
        subject: SubjectText = None,
        mode: ModeOf = "enforce",
    ) -> ViolationFilter:
        """The requested violations; without a time, those of the last 24 h."""
        if sum(sent is not None for sent in (api_key_id, ip, subject)) > 1:
            raise BadRequest("api_key_id, ip and subject are different subjects: send one of them")
        until_us = now_us() + 1 if until is None else parse_timestamp(until, "until")
        since_us = until_us - DAY_US if since is None else parse_timestamp(since, "since")
        if since_us >= until_us:
            raise BadRequest("since is not before until: swap the two")
        if api_key_id is not None:
            subject = await subject_of_key(editor, api_key_id)
        elif subject is not None:
            subject = attribute_subject_text(subject)
        else:
            subject = None if ip is None else f"i:{client_of(ip)}"
        return ViolationFilter(since_us, until_us, tier, rule, subject, shadow=mode == "shadow")

    # As a default, not in Annotated: FastAPI cannot resolve the annotation of a local function.
    selection = Depends(violation_filter)

    @routes.get("/violations", tags=["violations"], summary="List the minutes in which callers were blocked, newest first")
    async def violations(limit: Limit = 100, after: After = None, selected: ViolationFilter = selection) -> ViolationPage:
        page = await list_violations(database, limit, after, selected)
        return ViolationPage(items=[ViolationRead.model_validate(item) for item in page.items], next=page.next)

    @routes.get("/violations/top", tags=["violations"], summary="List what was blocked most, highest counts first")
    async def top(
        limit: TopLimit = 10, by: By = "subject", attribute: AttributeNames = None, selected: ViolationFilter = selection
    ) -> TopRead:
        if attribute is not None:
            selected = msgspec.structs.replace(selected, attributes=attribute_names(attribute))
        items = await top_violators(database, limit, by, selected)
        return TopRead(items=[ViolatorRead.model_validate(item) for item in items])

    @routes.get("/audit-log", tags=["audit log"], summary="List changes with the states before and after them, newest first")
    async def audit_log(
        limit: Limit = 100, after: After = None, kind: Exactly = None, target: Exactly = None, actor: Exactly = None
    ) -> AuditPage:
        page = await list_audit(editor, limit, after, kind, target, actor)
        return AuditPage(items=page.items, next=page.next)

    return routes
