"""/admin/v1/what-if: try a change of the policy on recorded traffic."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from fastapi import Path, Request

from tidegate.admin.models import Plain
from tidegate.admin.what_if import MAX_RULE_ID, WhatIf, WhatIfRuns
from tidegate.admin.what_if_runs import WhatIfRead
from tidegate.doors.admin.common import Actor, AdminRouter
from tidegate.errors import BadRequest

RunId = Annotated[str, Path(max_length=32), Plain]

_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "description": "A whole policy, or changed fields of one rule; and an access log of at most 16 MB, without which the "
        "traffic history of the rule is used.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "policy": {"type": "string", "description": "a policy file"},
                        "rule": {
                            "type": "object",
                            "additionalProperties": False,
                            "required": ["id"],
                            "properties": {
                                "id": {"type": "integer", "minimum": 1, "maximum": MAX_RULE_ID},
                                "limits": {"type": "array", "items": {"type": "string"}},
                                "mode": {"enum": ["enforce", "shadow"]},
                            },
                        },
                        "log": {"type": "string", "description": "an access log, in a format of tidegate simulate"},
                        "tier": {"type": "string", "description": "tier of requests without an API key of the policy"},
                        "subject": {"type": "string", "description": "what identifies a caller: ip, user, or a field"},
                    },
                },
            },
        },
    }
}


def what_if_routes(runs: WhatIfRuns) -> AdminRouter:
    """The routes of what-if."""
    routes = AdminRouter(prefix="/what-if", tags=["what-if"])

    @routes.post(
        "", status_code=202, summary="Try a change of the policy on recorded traffic; changes nothing", openapi_extra=_BODY
    )
    async def start(request: Request, actor: Actor) -> WhatIfRead:
        return await runs.start(actor, _parse(await request.body()))

    @routes.get("/{run_id}", summary="Read the progress or the result of a run")
    async def read(run_id: RunId) -> WhatIfRead:
        return await runs.read(run_id)

    @routes.delete("/{run_id}", summary="Cancel a run")
    async def cancel(run_id: RunId) -> WhatIfRead:
        return await runs.cancel(run_id)

    return routes


def _parse(body: bytes) -> WhatIf:
    # By msgspec: a log of 16 MB takes it some milliseconds, in which no check is answered.
    try:
        return msgspec.json.decode(body, type=WhatIf)
    except msgspec.ValidationError as error:
        raise BadRequest(f"the body is not valid: {str(error)[:200]}") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise BadRequest("the body must be JSON, sent with Content-Type: application/json") from None
