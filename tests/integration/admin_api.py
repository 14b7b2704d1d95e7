"""A control plane in this process for tests: a real catalog, a real gate, HTTP through ASGI."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import httpx

from tests.servers.migrated import copy_sqlite
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.what_if import WhatIfRuns
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.changes import Item
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.doors.admin.app import AdminDeps, add_guard, admin_app
from tidegate.gate.gate import Gate

TOKEN = "token-of-the-settings"


OF_THE_GUARD = frozenset({"trusted", "rate", "failed_rate", "failed_rate_overall", "body_timeout_s"})
"""Options that the routes do not depend on."""


class Replaceable:
    """Forwards to the object that a function returns at each use. Until there is one, its attributes are of this kind too."""

    def __init__(self, current: Callable[[], Any]) -> None:
        self._current = current

    def __getattr__(self, name: str) -> Any:
        current = self._current()
        return Replaceable(lambda: getattr(self._current(), name, None)) if current is None else getattr(current, name)


class ReusedApp:
    """Routes that serve one control plane after the other: to make them takes 0.1 s of CPU time, and to describe them 0.3 s."""

    idle: list[ReusedApp] = []  # noqa: RUF012

    def __init__(self) -> None:
        self._deps: AdminDeps | None = None
        self._what_if: WhatIfRuns | None = None
        editor, gate = (Replaceable(lambda name=name: getattr(self._deps, name, None)) for name in ("editor", "gate"))
        self.app = admin_app(AdminDeps(editor, gate, TOKEN, what_if=Replaceable(lambda: self._what_if)))

    def serve(self, deps: AdminDeps) -> None:
        """Serve another control plane, with a guard of its own."""
        self._deps, self._what_if = deps, WhatIfRuns(deps.editor)
        self.app.middleware_stack = None
        self.app.user_middleware.clear()
        add_guard(self.app, deps)


class Admin:
    """The control plane and what stands behind it; `close` when it is not needed any more."""

    def __init__(self, catalog: SqlCatalog, **options: Any) -> None:
        self.catalog = catalog
        self.cached = CachedCatalog(catalog)
        self.gate = Gate(self.cached, MemoryCounters())
        self.versions: list[int] = []
        self.editor = CatalogEditor(catalog, self._changed)
        options = {"rate": "1000000/minute", **options}
        deps = AdminDeps(self.editor, self.gate, TOKEN, **options)
        self._reused: ReusedApp | None = None
        if options.keys() <= OF_THE_GUARD:
            self._reused = ReusedApp.idle.pop() if ReusedApp.idle else ReusedApp()
            self._reused.serve(deps)
        self.app = admin_app(deps) if self._reused is None else self._reused.app
        self.http = self.client(TOKEN)

    def _changed(self, version: int, items: Collection[Item]) -> None:
        self.versions.append(version)
        self.cached.touched(version, items)

    def client(self, token: str | None) -> httpx.AsyncClient:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        transport = httpx.ASGITransport(app=self.app, client=("192.0.2.1", 1234))
        return httpx.AsyncClient(transport=transport, base_url="http://admin/admin/v1", headers=headers)

    async def close(self) -> None:
        """Close the client and the catalog; others may use the routes then."""
        await self.http.aclose()
        await self.catalog.close()
        if self._reused is not None:
            ReusedApp.idle.append(self._reused)
            self._reused = None

    async def tier(self, name: str = "free", limits: tuple[str, ...] = ("1000/day",)) -> dict[str, Any]:
        made = await self.http.post("/tiers", json={"name": name, "limits": list(limits)})
        assert made.status_code == 201, made.text
        return dict(made.json())

    async def rule(self, endpoint: str = "/api/*", **fields: Any) -> dict[str, Any]:
        made = await self.http.post(
            "/rate-limit-rules", json={"tier": "free", "limits": ["5/minute"], "endpoint": endpoint, **fields}
        )
        assert made.status_code == 201, made.text
        return dict(made.json())

    async def key(self, **fields: Any) -> dict[str, Any]:
        made = await self.http.post("/api-keys", json={"tier": "free", **fields})
        assert made.status_code == 201, made.text
        return dict(made.json())


def _make_sqlite(url: str) -> None:
    file = Path(url.removeprefix("sqlite:///"))
    if url.startswith("sqlite:///") and not file.exists():
        copy_sqlite(file)


async def open_admin(url: str, **options: Any) -> Admin:
    """Open the control plane of a catalog; a file of SQLite that is not there is made with the newest schema."""
    _make_sqlite(url)
    return Admin(await SqlCatalog.open(url), **options)
