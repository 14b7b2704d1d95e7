"""What an instance answers to probes, scrapers and readers of its description."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeAlias

from tidegate.doors.http import Response
from tidegate.doors.openapi import data_plane_openapi
from tidegate.doors.responses import encode
from tidegate.settings import CallersAuthSettings
from tidegate.telemetry.health import Health

Pages: TypeAlias = Mapping[str, Callable[[], Awaitable[Response]]]
"""What answers each path."""
_METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def probe_pages(
    health: Health,
    draining: Callable[[], bool],
    exposition: Callable[[], Awaitable[bytes]],
    callers: CallersAuthSettings,
) -> Pages:
    """The pages beside the checks.

    Args:
        health: of the instance.
        draining: whether it shuts down.
        exposition: returns the content of `/metrics`.
        callers: who may call the data plane.

    Returns:
        What answers each path.
    """

    async def health_page() -> Response:
        report = await health.report()
        return Response(200 if report.status == "healthy" else 503, "application/json", encode(report))

    async def ready_page() -> Response:
        ready = not draining()
        return Response(200 if ready else 503, "application/json", encode({"ready": ready, "draining": not ready}))

    async def live_page() -> Response:
        return Response(200, "application/json", encode({"live": True}))

    async def metrics_page() -> Response:
        return Response(200, _METRICS_TYPE, await exposition())

    async def openapi_page() -> Response:
        return Response(200, "application/json", encode(data_plane_openapi(callers.mode, callers.header)))

    return {
        "/health": health_page,
        "/readyz": ready_page,
        "/livez": live_page,
        "/metrics": metrics_page,
        "/openapi.json": openapi_page,
    }
