"""API keys in a catalog, made and listed as operators do it."""

from __future__ import annotations

from tidegate.admin import api_keys as editing_keys
from tidegate.admin import lists as reading
from tidegate.admin.records import Form
from tidegate.admin.rules import CatalogEditor
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.policy.key_format import hash_api_key
from tidegate.policy.model import ApiKey


def editor_of(catalog: SqlCatalog, cached: CachedCatalog | None = None) -> CatalogEditor:
    return CatalogEditor(catalog, (lambda *_: None) if cached is None else cached.touched)


async def make_key(catalog: SqlCatalog, tier: str, name: str = "", expires_at_us: int | None = None) -> tuple[str, ApiKey]:
    """The key, and the record that the catalog must have of it."""
    fields = editing_keys.KeyFields(tier, name, expires_at_us)
    api_key, _ = await editing_keys.create_key(editor_of(catalog), "test", fields)
    return api_key, ApiKey(hash_api_key(api_key), tier, name=name, expires_at_us=expires_at_us)


async def revoke_key(catalog: SqlCatalog, key_id: str, reason: str, cached: CachedCatalog | None = None) -> Form:
    return await editing_keys.revoke_key(editor_of(catalog, cached), "test", key_id, reason)


async def listed_keys(catalog: SqlCatalog, limit: int = 100, after: str | None = None, tier: str | None = None) -> list[Form]:
    return (await reading.list_keys(editor_of(catalog), limit, after, tier)).items
