"""The OpenAPI 3.1 description of the data plane, generated from the types of its requests and answers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import msgspec

from tidegate._version import __version__
from tidegate.decision import MAX_COST
from tidegate.doors.openapi_callers import describe_callers
from tidegate.doors.openapi_holds import HOLD_BODIES, describe_holds, hold_paths
from tidegate.doors.openapi_reserve import RESERVE_BODIES, describe_reservations, reserve_paths
from tidegate.gate.usage import MAX_USAGE_RULES
from tidegate.policy.namespaces import MAX_SUBJECT, NAME
from tidegate.wire import MAX_BATCH, CheckRequest, DecisionBody, LimitRequest, UsageBody

_ERRORS: Final = {
    400: "The request is invalid; nothing was charged.",
    401: "The API key is missing or unknown.",
    403: "The API key was revoked or has expired, or the policy or an operator denies the client (BLOCKED).",
    405: "The path does not support this method.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "Content-Encoding is not supported.",
    429: "The client address sent too many unknown API keys; see Retry-After.",
    404: "The hold, or the reservation, is not known.",
    409: "The hold was settled or has expired.",
    431: "The headers are too large.",
    503: "The counter store or the catalog is unavailable.",
}
_ERROR_SCHEMA: Final = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "details"],
            "properties": {"code": {"type": "string"}, "message": {"type": "string"}, "details": {"type": "object"}},
        }
    },
}
_LIMIT_HEADERS: Final = {
    "RateLimit-Policy": "Quotas that apply, in the format of draft-ietf-httpapi-ratelimit-headers-10.",
    "RateLimit": "Remaining units of the quota with the fewest remaining.",
    "X-RateLimit-Limit": "The largest number of units that can be consumed at once.",
    "X-RateLimit-Remaining": "Remaining units.",
    "X-RateLimit-Reset": "Unix time in seconds when the limit is fully replenished.",
    "Retry-After": "On 429: seconds to wait.",
}


@lru_cache(maxsize=4)
def data_plane_openapi(callers: str = "open", token_header: str = "") -> dict[str, Any]:
    """The OpenAPI 3.1 document, as JSON types; cached, so callers must not change it.

    Args:
        callers: `[callers_auth] mode`: open, token or mtls.
        token_header: that carries a caller's token.
    """
    document = _open_document()
    if callers != "open":
        describe_callers(document, token_header if callers == "token" else None)
    return document


def _open_document() -> dict[str, Any]:
    _, schemas = msgspec.json.schema_components(
        (CheckRequest, LimitRequest, DecisionBody, UsageBody, *HOLD_BODIES, *RESERVE_BODIES),
        ref_template="#/components/schemas/{name}",
    )
    schemas["CheckRequest"]["properties"]["cost"].update(minimum=0, maximum=MAX_COST)
    schemas["CheckRequest"]["properties"]["path"].update(minLength=1, pattern="^/", examples=["/api/v1/items"])
    limit_fields = schemas["LimitRequest"]["properties"]
    limit_fields["cost"].update(minimum=0, maximum=MAX_COST)
    limit_fields["namespace"].update(pattern=f"^{NAME.pattern}$", examples=["emails"])
    limit_fields["subject"].update(minLength=1, maxLength=MAX_SUBJECT, examples=["user-42"])
    limit_fields["limits"].update(examples=[["10/minute"]])
    describe_holds(schemas)
    describe_reservations(schemas)
    schemas["BatchRequest"] = _batch_schema("CheckRequest")
    schemas["LimitBatchRequest"] = _batch_schema("LimitRequest")
    schemas["Error"] = _ERROR_SCHEMA
    schemas["BatchAnswer"] = {
        "type": "object",
        "required": ["decisions"],
        "properties": {
            "decisions": {
                "type": "array",
                "description": "In the order of the checks; an error for each check that could not be decided.",
                "items": {"anyOf": [{"$ref": "#/components/schemas/DecisionBody"}, {"$ref": "#/components/schemas/Error"}]},
            }
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tidegate data plane",
            "version": __version__,
            "description": "Decides whether a request is allowed. A denied check consumes nothing.",
        },
        "paths": {
            "/v1/check": {"post": _check()},
            "/v1/check/batch": {"post": _batch()},
            "/v1/limit": {"post": _limit()},
            "/v1/limit/batch": {"post": _limit_batch()},
            **hold_paths(_errors, _headers),
            **reserve_paths(_errors, _headers),
            "/v1/authorize": {"get": _authorize("authorize"), "head": _authorize("authorizeHead")},
            "/v1/authorize/envoy": {
                method: _authorize(f"authorizeEnvoy{method.title()}", "200")
                for method in ("get", "head", "post", "put", "patch", "delete", "options")
            },
            "/v1/usage": {"get": _usage("usage"), "head": _usage("usageHead")},
            "/health": {"get": _page("health", "Health of all components; 200 only when all are healthy.", (200, 503))},
            "/readyz": {"get": _page("ready", "Whether this instance accepts requests; for load balancers.", (200, 503))},
            "/livez": {"get": _page("live", "Whether this process is running.", (200,))},
            "/metrics": {"get": _page("metrics", "Metrics in Prometheus' text format.", (200,), "text/plain")},
            "/openapi.json": {"get": _page("openapi", "This document.", (200,))},
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"}},
        },
    }


def _batch_schema(item: str) -> dict[str, Any]:
    items = {"type": "array", "minItems": 1, "maxItems": MAX_BATCH, "items": {"$ref": f"#/components/schemas/{item}"}}
    return {"type": "object", "required": ["checks"], "additionalProperties": False, "properties": {"checks": items}}


def _limit() -> dict[str, Any]:
    decided = {"application/json": {"schema": {"$ref": "#/components/schemas/DecisionBody"}}}
    return {
        "operationId": "limit",
        "summary": "Decide a request by limits of its own, or by those of its namespace, and charge it if it is allowed.",
        "requestBody": _body("LimitRequest"),
        "responses": {
            "200": {"description": "Allowed.", "headers": _headers(), "content": decided},
            "429": {"description": "Denied.", "headers": _headers(), "content": decided},
            **_errors(400, 405, 408, 413, 415, 431, 503),
        },
    }


def _limit_batch() -> dict[str, Any]:
    return {
        **_batch(),
        "operationId": "limitBatch",
        "summary": "Decide several requests by limits of their own, each independently, in order.",
        "security": [{}],
        "requestBody": _body("LimitBatchRequest"),
    }


def _check() -> dict[str, Any]:
    decided = {"application/json": {"schema": {"$ref": "#/components/schemas/DecisionBody"}}}
    return {
        "operationId": "check",
        "summary": "Decide one request and charge it if it is allowed.",
        "security": [{"ApiKey": []}, {}],
        "requestBody": _body("CheckRequest"),
        "responses": {
            "200": {"description": "Allowed.", "headers": _headers(), "content": decided},
            "429": {
                "description": "Denied; or the client address sent too many unknown API keys, see X-Tidegate-Error.",
                "headers": _headers(),
                "content": {
                    "application/json": {
                        "schema": {
                            "anyOf": [{"$ref": "#/components/schemas/DecisionBody"}, {"$ref": "#/components/schemas/Error"}]
                        }
                    }
                },
            },
            **_errors(400, 401, 403, 405, 408, 413, 415, 431, 503),
        },
    }


def _batch() -> dict[str, Any]:
    return {
        "operationId": "checkBatch",
        "summary": "Decide several requests, each on its own, in order.",
        "security": [{"ApiKey": []}, {}],
        "requestBody": _body("BatchRequest"),
        "responses": {
            "200": {
                "description": "The decisions.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/BatchAnswer"}}},
            },
            **_errors(400, 405, 408, 413, 415, 431, 503),
        },
    }


def _authorize(operation: str, passes: str = "204") -> dict[str, Any]:
    empty = {
        passes: {
            "description": "Allowed.",
            "headers": _headers()
            | {"X-Tidegate-Overage": _text_header("Units that pass above a quota or a soft limit, if there are any.")},
        },
        "401": {"description": "The API key is missing or unknown; see X-Tidegate-Error."},
        "403": {
            "description": "The API key was revoked or has expired, or the client is denied (BLOCKED); see X-Tidegate-Error. "
            "With X-Tidegate-Denied-Status: 403 "
            "also every other refusal except 401; see X-Tidegate-Status.",
            "headers": _headers()
            | {"X-Tidegate-Status": _text_header("The status without X-Tidegate-Denied-Status: 429, 400, 431 or 503.")},
        },
        "429": {
            "description": "Denied; or the client address sent too many unknown API keys, see X-Tidegate-Error.",
            "headers": _headers()
            | {
                "Cache-Control": _text_header("How long the denial may be cached."),
                "Vary": _text_header("Request headers that the denial depends on."),
            },
        },
    }
    return {
        "operationId": operation,
        "summary": "Decide the request that a gateway describes in headers.",
        "security": [{"ApiKey": []}, {}],
        "parameters": [
            _header("X-Original-URI", "Path of the request; its query is ignored."),
            _header("X-Original-Method", "Method of the request; GET if absent."),
            _header("X-Forwarded-Uri", "As X-Original-URI, from a trusted proxy."),
            _header("X-Forwarded-Method", "As X-Original-Method, from a trusted proxy."),
            _header("X-Tidegate-Denied-Status", "403: answer 403 for every refusal except 401. Other values are ignored."),
            *_client_headers(),
        ],
        "responses": {**empty, **_errors(400, 405, 431, 503)},
    }


def _usage(operation: str) -> dict[str, Any]:
    return {
        "operationId": operation,
        "summary": f"Usage of the caller under the first {MAX_USAGE_RULES} rules of its tier; consumes nothing.",
        "security": [{"ApiKey": []}, {}],
        "parameters": _client_headers(),
        "responses": {
            "200": {
                "description": "The usage of each rule.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/UsageBody"}}},
            },
            **_errors(400, 401, 403, 405, 429, 431, 503),
        },
    }


def _page(operation: str, summary: str, statuses: tuple[int, ...], content_type: str = "application/json") -> dict[str, Any]:
    content = {content_type: {"schema": {} if content_type == "text/plain" else {"type": "object"}}}
    return {
        "operationId": operation,
        "summary": summary,
        "responses": {str(status): {"description": summary, "content": content} for status in statuses} | _errors(405),
    }


def _client_headers() -> list[dict[str, Any]]:
    return [
        _header("X-Real-IP", "Client address, from a trusted proxy."),
        _header("X-Forwarded-For", "Addresses, from a trusted proxy; the last untrusted one is the client."),
        _header("Forwarded", "As X-Forwarded-For, in the form of RFC 7239; used if neither of the two is present."),
    ]


def _header(name: str, text: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": text, "schema": {"type": "string"}}


def _body(schema: str) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}}


def _headers() -> dict[str, Any]:
    return {name: _text_header(text) for name, text in _LIMIT_HEADERS.items()}


def _text_header(text: str) -> dict[str, Any]:
    return {"description": text, "schema": {"type": "string"}}


def _errors(*statuses: int) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {str(status): {"description": _ERRORS[status], "content": content} for status in statuses}
