"""What the OpenAPI description says where callers of the data plane need a token or a certificate."""

from __future__ import annotations

from typing import Any, Final

_TOKEN: Final = "CallerToken"
_CERTIFICATE: Final = "CallerCertificate"
_ERROR: Final = {"$ref": "#/components/schemas/Error"}
_REFUSALS: Final = {
    "401": "The caller has no token or certificate that works (CALLER_UNAUTHENTICATED).",
    "403": "The caller may not do this (CALLER_FORBIDDEN).",
    "429": "Too many wrong tokens came (see Retry-After and X-Tidegate-Error).",
}


def describe_callers(document: dict[str, Any], token_header: str | None) -> None:
    """Add how callers authenticate to the operations below `/v1/`: the others need nothing.

    Args:
        document: without callers; it is changed.
        token_header: that carries a caller's token; None where its certificate counts.
    """
    name = _CERTIFICATE if token_header is None else _TOKEN
    document["components"]["securitySchemes"][name] = (
        {"type": "mutualTLS", "description": "A certificate with a name of callers_auth.names."}
        if token_header is None
        else {
            "type": "apiKey",
            "in": "header",
            "name": token_header,
            "description": "Token of the gateway or back end that calls, not of the request to decide; with or without Bearer.",
        }
    )
    for path, operations in document["paths"].items():
        if not path.startswith("/v1/"):
            continue
        for operation in operations.values():
            operation["security"] = [{**each, name: []} for each in operation.get("security", [{}])]
            responses = operation["responses"]
            for status, text in _REFUSALS.items():
                if status == "429" and token_header is None:
                    continue
                described = responses.setdefault(status, {"content": {"application/json": {"schema": _ERROR}}})
                described["description"] = f"{described['description']} {text}" if "description" in described else text
                _allow_error(described)


def _allow_error(response: dict[str, Any]) -> None:
    """Let a response that has a body have the error form too."""
    content = response.get("content")
    if content is None:
        return
    schema = content["application/json"]["schema"]
    if schema != _ERROR and _ERROR not in schema.get("anyOf", ()):
        response["content"] = {"application/json": {"schema": {"anyOf": [schema, _ERROR]}}}
