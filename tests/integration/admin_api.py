"""A control plane in this process for tests: a real catalog, a real gate, HTTP through ASGI."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import httpx

from tidegate.admin.rules import CatalogEditor
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.changes import Item
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.doors.admin.app import AdminDeps, admin_app
from tidegate.gate.gate import Gate

TOKEN = "token-of-the-settings"


class Admin:
    """The control plane and what stands behind it."""

    def __init__(self, catalog: SqlCatalog, **options: Any) -> None:
        self.catalog = catalog
        self.cached = CachedCatalog(catalog)
        self.gate = Gate(self.cached, MemoryCounters())
        self.versions: list[int] = []
        self.editor = CatalogEditor(catalog, self._changed)
        options = {"rate": "1000000/minute", **options}
        self.app = admin_app(AdminDeps(self.editor, self.gate, TOKEN, **options))
        self.http = self.client(TOKEN)

    def _changed(self, version: int, items: Collection[Item]) -> None:
        self.versions.append(version)
        self.cached.touched(version, items)

    def client(self, token: str | None) -> httpx.AsyncClient:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        transport = httpx.ASGITransport(app=self.app, client=("192.0.2.1", 1234))
        return httpx.AsyncClient(transport=transport, base_url="http://admin/admin/v1", headers=headers)

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


async def open_admin(url: str, **options: Any) -> Admin:
    return Admin(await SqlCatalog.open(url), **options)
