"""/admin/v1/traffic."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from fastapi import Depends, Query, Response

from tidegate.admin.models import Plain, Timestamp
from tidegate.admin.models.traffic import TrafficCallerRead, TrafficCallersRead, TrafficRead
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.usage import attribute_subject_text, subject_of_key
from tidegate.doors.admin.common import AdminRouter, Exactly, Ip, KeyId
from tidegate.doors.responses import encode
from tidegate.errors import BadRequest
from tidegate.ip_addresses import client_of
from tidegate.ledger.traffic import TrafficFilter, read_latency, read_traffic, top_callers
from tidegate.timestamps import now_us, parse_timestamp

DAY_US: Final = 86_400_000_000
_STORED: Final = ("k:", "i:", "t:", "a:", "n:", "N:")
"""Beginnings of subjects as the history has them."""

Step = Annotated[Literal["60", "3600", "86400"], Query(description="duration of a step, s; by subject at least 3600")]
Rules = Annotated[int, Query(ge=1, le=100, description="rules listed separately: those with the most units")]
Sort = Literal["total", "allowed", "blocked", "over"]
TopLimit = Annotated[int, Query(ge=1, le=500, description="maximum number of items")]
From = Annotated[Timestamp | None, Query(alias="from", description="from this time on; by default a day before `to`")]
To = Annotated[Timestamp | None, Query(description="before this time; by default now")]
SubjectText = Annotated[
    str | None,
    Query(max_length=5000, description="subject as an item of /traffic/callers has it, or of attributes, such as user=42"),
    Plain,
]


def traffic_routes(editor: CatalogEditor) -> AdminRouter:
    """The routes of the traffic history."""
    routes = AdminRouter(tags=["traffic"])
    database = editor.catalog.database

    async def traffic_filter(
        from_: From = None,
        to: To = None,
        tier: Exactly = None,
        rule: Exactly = None,
        api_key_id: KeyId = None,
        ip: Ip = None,
        subject: SubjectText = None,
    ) -> TrafficFilter:
        """The requested traffic; without a time, that of the last 24 h."""
        if sum(sent is not None for sent in (api_key_id, ip, subject)) > 1:
            raise BadRequest("api_key_id, ip and subject are different subjects: send one of them")
        from_us, to_us = read_range(from_, to)
        if api_key_id is not None:
            subject = await subject_of_key(editor, api_key_id)
        elif ip is not None:
            subject = f"i:{client_of(ip)}"
        elif subject is not None and not subject.startswith(_STORED):
            subject = attribute_subject_text(subject)
        return TrafficFilter(from_us, to_us, tier, rule, subject)

    # As a default, not in Annotated: FastAPI cannot resolve the annotation of a local function.
    selection = Depends(traffic_filter)

    @routes.get(
        "/traffic",
        response_model=TrafficRead,
        summary="Read units allowed, blocked and over by rule and time, and the latency of checks",
    )
    async def traffic(step: Step = "3600", limit: Rules = 10, selected: TrafficFilter = selection) -> Response:
        step_s = int(step)
        items = await read_traffic(database, selected, step_s, limit)
        latency = await read_latency(database, selected, step_s)
        # Encoded here: a validated response of 20,000 items would keep checks waiting.
        return Response(encode({"step_s": step_s, "items": items, "latency": latency}), media_type="application/json")

    @routes.get("/traffic/callers", summary="List the callers with the most units, highest first")
    async def callers(limit: TopLimit = 10, sort: Sort = "total", selected: TrafficFilter = selection) -> TrafficCallersRead:
        found = await top_callers(database, selected, limit, sort)
        return TrafficCallersRead(items=[TrafficCallerRead.model_validate(item) for item in found])

    return routes


def read_range(from_: str | None, to: str | None) -> tuple[int, int]:
    """The range of a request, µs since the epoch; by default the last 24 h.

    Raises:
        BadRequest: if a time is not valid, or the range is empty.
    """
    to_us = now_us() + 1 if to is None else parse_timestamp(to, "to")
    from_us = to_us - DAY_US if from_ is None else parse_timestamp(from_, "from")
    if from_us >= to_us:
        raise BadRequest("from is not before to: swap the two", field="from")
    return from_us, to_us
