"""The OpenAPI description of reservations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tidegate.doors.openapi_parts import content, denied_content, describe_check_fields, id_parameter
from tidegate.gate.reservations import MAX_WAIT_S
from tidegate.wire import ReservationCancelledBody, ReserveAnswer, ReserveRequest

RESERVE_BODIES: Final = (ReserveRequest, ReserveAnswer, ReservationCancelledBody)
_ID: Final = id_parameter("reservation")


def describe_reservations(schemas: dict[str, Any]) -> None:
    """Add to the schemas what types do not say.

    Args:
        schemas: by name; changed.
    """
    fields = schemas["ReserveRequest"]["properties"]
    describe_check_fields(fields, path="/api/v1/items", namespace="partner-api", subject="all")
    fields["at_most_s"].update(minimum=0, maximum=MAX_WAIT_S, examples=[30])


def reserve_paths(errors: Callable[..., dict[str, Any]], headers: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The paths of reservations.

    Args:
        errors: describes the responses of statuses.
        headers: describes the limit headers.

    Returns:
        The path items.
    """
    return {
        "/v1/reserve": {
            "post": {
                "operationId": "reserve",
                "summary": "Charge a check for the first moment at which it passes, first come, first served.",
                "security": [{"ApiKey": []}, {}],
                "requestBody": {"required": True, "content": content("ReserveRequest")},
                "responses": {
                    "200": {
                        "description": "The caller may go after `wait_s`.",
                        "headers": headers(),
                        "content": content("ReserveAnswer"),
                    },
                    "429": {
                        "description": "No place within `at_most_s`, and nothing is charged; or too many reservations wait "
                        "(TOO_MANY_RESERVATIONS).",
                        "headers": headers(),
                        "content": denied_content("ReserveAnswer"),
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
                    "200": {"description": "Cancelled, or too late.", "content": content("ReservationCancelledBody")},
                    **errors(400, 404, 405, 408, 413, 415, 431, 503),
                },
            }
        },
    }
