"""API keys in a catalog, made and listed as operators do it."""

from __future__ import annotations

from tidegate.admin import api_keys
from tidegate.admin.lists import list_keys
from tidegate.admin.models import JsonObject, KeyCreate, RevokeRequest
from tidegate.admin.rules import CatalogEditor
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.policy.key_format import hash_api_key
from tidegate.policy.model import ApiKey
from tidegate.timestamps import format_timestamp


def editor_of(catalog: SqlCatalog, cached: CachedCatalog | None = None) -> CatalogEditor:
    return CatalogEditor(catalog, (lambda *_: None) if cached is None else cached.touched)


async def make_key(catalog: SqlCatalog, tier: str, name: str = "", expires_at_us: int | None = None) -> tuple[str, ApiKey]:
    """The key, and the record that the catalog must have of it."""
    request = KeyCreate(tier=tier, name=name, expires_at=format_timestamp(expires_at_us))
    api_key = (await api_keys.create_key(editor_of(catalog), "test", request)).api_key
    return api_key, ApiKey(hash_api_key(api_key), tier, name=name, expires_at_us=expires_at_us)


async def revoke_key(catalog: SqlCatalog, key_id: str, reason: str, cached: CachedCatalog | None = None) -> JsonObject:
    request = RevokeRequest.model_construct(reason=reason)
    return (await api_keys.revoke_key(editor_of(catalog, cached), "test", key_id, request)).audited()


async def listed_keys(
    catalog: SqlCatalog, limit: int = 100, after: str | None = None, tier: str | None = None
) -> list[JsonObject]:
    return [key.audited() for key in (await list_keys(editor_of(catalog), limit, after, tier)).items]
