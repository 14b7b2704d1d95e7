"""The control plane of an instance: the admin API and the console, as what a listener serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tidegate.admin.rules import CatalogEditor
from tidegate.admin.what_if import WhatIfRuns
from tidegate.doors.admin.app import AdminDeps, ConsoleOptions, admin_app
from tidegate.doors.client_address import TrustedProxies
from tidegate.doors.http_asgi import AsgiAdapter
from tidegate.gate.gate import Gate
from tidegate.policy.paths import PathRules
from tidegate.settings import Settings


def control_plane(
    settings: Settings,
    editor: CatalogEditor,
    gate: Gate,
    paths: PathRules,
    what_if: WhatIfRuns,
    system: Callable[[], Any],
    demo_token: str | None,
) -> AsgiAdapter:
    """What the admin listener serves.

    Args:
        editor: changes the catalog.
        gate: of the data plane: usage, resets and explanations.
        paths: what paths may contain.
        what_if: the runs of what-if.
        system: reports on the instance, see `system_report`.
        demo_token: signs in browsers on this machine without a token; None for none.
    """
    console = None
    if settings.admin.console:
        secure = settings.admin.secure_cookie or settings.uses_tls("admin")
        console = ConsoleOptions(settings.admin.session_idle_s, secure, demo_token)
    deps = AdminDeps(
        editor,
        gate,
        settings.admin.token or None,
        TrustedProxies(settings.admin.trusted_proxies, setting="admin.trusted_proxies"),
        body_timeout_s=settings.server.body_timeout_s,
        paths=paths,
        console=console,
        system=system,
        what_if=what_if,
    )
    return AsgiAdapter(admin_app(deps))
