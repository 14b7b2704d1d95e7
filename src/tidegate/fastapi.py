"""For FastAPI: `limit`, `exempt`, `RateLimitMiddleware`, and `document_limits`, which shows denials in OpenAPI."""

from __future__ import annotations

from typing import Any

from tidegate.doors.asgi import RateLimitMiddleware
from tidegate.doors.default_limits import flat_routes
from tidegate.doors.exceeded import RateLimitExceeded
from tidegate.doors.limit import limit
from tidegate.doors.limited_functions import TOO_MANY_REQUESTS, exempt

__all__ = ["RateLimitExceeded", "RateLimitMiddleware", "document_limits", "exempt", "limit"]


def document_limits(app: Any) -> None:
    """Show the response 429 in the OpenAPI description of every endpoint with a limit; call it once, at any time."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        described: dict[str, Any] = describe()
        for route in flat_routes(app.routes):
            if route.limited:
                operations = described["paths"].get(route.path, {})
                for method in route.methods:
                    if (operation := operations.get(method.lower())) is not None:
                        operation["responses"].setdefault("429", TOO_MANY_REQUESTS)
        return described

    app.openapi = openapi
