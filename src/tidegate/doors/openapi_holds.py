"""The OpenAPI description of holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tidegate.counters.holds import MAX_TTL_S, MIN_TTL_S
from tidegate.decision import MAX_COST
from tidegate.doors.openapi_parts import content, denied_content, describe_check_fields, id_parameter
from tidegate.wire import HoldAnswer, HoldRenewedBody, HoldRequest, HoldSettledBody, RenewRequest, SettleRequest

HOLD_BODIES: Final = (HoldRequest, HoldAnswer, SettleRequest, HoldSettledBody, RenewRequest, HoldRenewedBody)
_ID: Final = id_parameter("hold")


def describe_holds(schemas: dict[str, Any]) -> None:
    """Add to the schemas what types do not say.

    Args:
        schemas: by name; changed.
    """
    fields = schemas["HoldRequest"]["properties"]
    describe_check_fields(fields, path="/v1/chat/completions", namespace="tokens", subject="user-42")
    fields["ttl_s"].update(minimum=MIN_TTL_S, maximum=MAX_TTL_S)
    schemas["SettleRequest"]["properties"]["cost"].update(minimum=0, maximum=MAX_COST)
    schemas["RenewRequest"]["properties"]["ttl_s"].update(minimum=MIN_TTL_S, maximum=MAX_TTL_S)


_HOLD_HEADER: Final = {
    "X-Tidegate-Hold": {"description": "The id, for gateways that read headers only.", "schema": {"type": "string"}}
}


def hold_paths(errors: Callable[..., dict[str, Any]], headers: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The paths of holds.

    Args:
        errors: describes the responses of statuses.
        headers: describes the limit headers.

    Returns:
        The path items.
    """
    return {
        "/v1/holds": {
            "post": {
                "operationId": "openHold",
                "summary": "Reserve the most that a request may cost, until it is settled or the hold expires.",
                "security": [{"ApiKey": []}, {}],
                "requestBody": {"required": True, "content": content("HoldRequest")},
                "responses": {
                    "200": {"description": "Reserved.", "headers": headers() | _HOLD_HEADER, "content": content("HoldAnswer")},
                    "429": {
                        "description": "Denied, and nothing is reserved; or too many holds are open (TOO_MANY_HOLDS).",
                        "headers": headers(),
                        "content": denied_content("HoldAnswer"),
                    },
                    **errors(400, 401, 403, 405, 408, 413, 415, 431, 503),
                },
            }
        },
        "/v1/holds/{id}/settle": {
            "post": {
                "operationId": "settleHold",
                "summary": "End a hold and charge exactly what was used, also above the limits. Idempotent.",
                "parameters": [_ID],
                "requestBody": {"required": True, "content": content("SettleRequest")},
                "responses": {
                    "200": {"description": "Settled.", "content": content("HoldSettledBody")},
                    **errors(400, 404, 405, 408, 413, 415, 431, 503),
                },
            }
        },
        "/v1/holds/{id}/renew": {
            "post": {
                "operationId": "renewHold",
                "summary": "Let an open hold expire later.",
                "parameters": [_ID],
                "requestBody": {"required": True, "content": content("RenewRequest")},
                "responses": {
                    "200": {"description": "Renewed.", "content": content("HoldRenewedBody")},
                    **errors(400, 404, 405, 408, 409, 413, 415, 431, 503),
                },
            }
        },
    }
