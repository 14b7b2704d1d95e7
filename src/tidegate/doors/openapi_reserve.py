"""The OpenAPI description of reservations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tidegate.counters.handle_text import MAX_ID
from tidegate.decision import MAX_COST
from tidegate.gate.reservations import MAX_WAIT_S
from tidegate.policy.namespaces import MAX_SUBJECT, NAME
from tidegate.wire import ReservationCancelledBody, ReserveAnswer, ReserveRequest

RESERVE_BODIES: Final = (ReserveRequest, ReserveAnswer, ReservationCancelledBody)
_ID: Final = {
    "name": "id",
    "in": "path",
    "required": True,
    "description": "Id of the reservation.",
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_ID, "pattern": "^[A-Za-z0-9_-]+$"},
}


def describe_reservations(schemas: dict[str, Any]) -> None:
    """Add to the schemas what types do not say.

    Args:
        schemas: by name; changed.
    """
    fields = schemas["ReserveRequest"]["properties"]
    fields["cost"].update(minimum=0, maximum=MAX_COST)
    fields["at_most_s"].update(minimum=0, maximum=MAX_WAIT_S, examples=[30])
    fields["path"].update(pattern="^/", examples=["/api/v1/items"])
    fields["namespace"].update(pattern=f"^{NAME.pattern}$", examples=["partner-api"])
    fields["subject"].update(minLength=1, maxLength=MAX_SUBJECT, examples=["all"])


def reserve_paths(errors: Callable[..., dict[str, Any]], headers: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The paths of reservations.

    Args:
        errors: describes the responses of statuses.
        headers: describes the limit headers.

    Returns:
        The path items.
    """
    answer = _content("ReserveAnswer")
    error = {"$ref": "#/components/schemas/Error"}
    denied = {"application/json": {"schema": {"anyOf": [answer["application/json"]["schema"], error]}}}
    return {
        "/v1/reserve": {
            "post": {
                "operationId": "reserve",
                "summary": "Charge a check for the first moment at which it passes, first come, first served.",
                "security": [{"ApiKey": []}, {}],
                "requestBody": {"required": True, "content": _content("ReserveRequest")},
                "responses": {
                    "200": {"description": "The caller may go after `wait_s`.", "headers": headers(), "content": answer},
                    "429": {
                        "description": "No place within `at_most_s`, and nothing is charged; or too many reservations wait "
                        "(TOO_MANY_RESERVATIONS).",
                        "headers": headers(),
                        "content": denied,
                    },
                    **errors(400, 401, 403, 405, 408, 413, 415, 431, 503),
                },
            }
        },
        "/v1/reserve/{id}/cancel": {
            "post": {
                "operationId": "cancelReservation",
                "summary": "Give a place back before its moment. Idempotent. The body is ignored.",
                "parameters": [_ID],
                "responses": {
                    "200": {"description": "Cancelled, or too late.", "content": _content("ReservationCancelledBody")},
                    **errors(400, 404, 405, 408, 413, 415, 431, 503),
                },
            }
        },
    }


def _content(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
