"""/admin/v1/system: this process, its stores and its settings, for the console."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import ConfigDict

from tidegate._version import __version__
from tidegate.admin.models.base import JsonObject, ResponseModel
from tidegate.doors.admin.common import AdminRouter


class SystemRead(ResponseModel):
    """The state of the process that answers. Which fields there are depends on its stores."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": True})

    version: str


def system_routes(report: Callable[[], Awaitable[JsonObject]] | None) -> AdminRouter:
    """The route of the system's state.

    Args:
        report: returns the state of this process; None where the control plane runs without a server.
    """
    routes = AdminRouter(tags=["system"])

    @routes.get("/system", summary="Read the health, stores and settings of the process that answers; secrets are hidden")
    async def read() -> SystemRead:
        found: dict[str, Any] = {"version": __version__} if report is None else await report()
        return SystemRead(**found)

    return routes
