"""Access to API keys for commands, with the same results in the database and over the admin API.

Errors are the same for both: a code and a sentence. An API key in an argument is hashed here; only its id is sent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import msgspec

from tidegate.admin import api_keys
from tidegate.admin.key_import import KeyImportRequest, KeyImportResult, import_keys
from tidegate.admin.lists import list_keys
from tidegate.admin.models import (
    KeyCreate,
    KeyMade,
    KeyPage,
    KeyPatch,
    KeyRead,
    KeyRotated,
    OverridesRequest,
    RevokeRequest,
    RotateRequest,
)
from tidegate.admin.rules import CatalogEditor
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.paging import MAX_PAGE, Page
from tidegate.cli.catalog_access import ServerOptions, cli_actor, with_either
from tidegate.cli.client_tls import ClientTls
from tidegate.cli.common import read_settings
from tidegate.cli.control_plane import ControlPlane
from tidegate.errors import TidegateError
from tidegate.policy.key_format import hash_api_key, is_possible_key

_ID_PREFIX: Final = re.compile(r"[0-9a-f]{6,24}", re.ASCII)

_T = TypeVar("_T")


class KeyFilter(msgspec.Struct, frozen=True):
    """Selects keys; None selects all.

    Args:
        name: substring of the name, case-insensitive.
    """

    tier: str | None = None
    status: str | None = None
    name: str | None = None
    id_prefix: str | None = None
    customer: str | None = None


class KeyNotFound(TidegateError):
    """The argument matches no API key, or several. The message does not contain it: it may be the key itself."""

    code = "NOT_FOUND"


class ApiKeys(Protocol):
    """Operations on API keys. Every method raises a TidegateError if it is rejected."""

    async def create(self, request: KeyCreate) -> KeyMade:
        """Create a key.

        Raises:
            TidegateError: if the tier does not exist.
        """

    async def import_batch(self, request: KeyImportRequest) -> KeyImportResult:
        """Import up to 1,000 keys that another system issued.

        Raises:
            TidegateError: if nothing of the batch was imported.
        """

    async def page(self, key_filter: KeyFilter, limit: int, after: str | None) -> Page[KeyRead]:
        """A page of the list of keys, by id.

        Raises:
            TidegateError: if the keys cannot be read.
        """

    async def revoke(self, record: KeyRead, request: RevokeRequest) -> KeyRead:
        """Revoke a key.

        Raises:
            TidegateError: if it is revoked already, or the policy file owns it.
        """

    async def rotate(self, record: KeyRead, grace_s: int) -> KeyRotated:
        """Replace a key by a new one with the same tier, name, expiry and limits.

        Args:
            grace_s: how long the old key remains valid, s; with 0 it is revoked at once.

        Returns:
            The new key, which no other result contains, and both records.

        Raises:
            TidegateError: if the old key is revoked or expired, or the policy file owns it.
        """

    async def override(self, record: KeyRead, request: OverridesRequest) -> KeyRead:
        """Replace all limits that a key has of its own.

        Raises:
            TidegateError: if a limit is not valid, the key was changed since, or the policy file owns it.
        """

    async def delete(self, record: KeyRead) -> None:
        """Delete the record of a key.

        Raises:
            TidegateError: if the key is still valid, was changed since, or the policy file owns it.
        """


class KeysInCatalog:
    """API keys in the database. See `ApiKeys`."""

    def __init__(self, catalog: SqlCatalog, actor: str) -> None:
        # This process has no cache; other processes are notified by the database.
        self._editor = CatalogEditor(catalog, lambda *_: None)
        self._actor = actor

    async def create(self, request: KeyCreate) -> KeyMade:
        """See `ApiKeys.create`."""
        return await api_keys.create_key(self._editor, self._actor, request)

    async def import_batch(self, request: KeyImportRequest) -> KeyImportResult:
        """See `ApiKeys.import_batch`."""
        return await import_keys(self._editor, self._actor, request)

    async def page(self, key_filter: KeyFilter, limit: int, after: str | None) -> Page[KeyRead]:
        """See `ApiKeys.page`."""
        return await list_keys(self._editor, limit, after, **msgspec.structs.asdict(key_filter))

    async def revoke(self, record: KeyRead, request: RevokeRequest) -> KeyRead:
        """See `ApiKeys.revoke`."""
        return await api_keys.revoke_key(self._editor, self._actor, record.id, request)

    async def rotate(self, record: KeyRead, grace_s: int) -> KeyRotated:
        """See `ApiKeys.rotate`."""
        return await api_keys.rotate_key(self._editor, self._actor, record.id, grace_s)

    async def override(self, record: KeyRead, request: OverridesRequest) -> KeyRead:
        """See `ApiKeys.override`."""
        patch = KeyPatch(limits=request.limits, overrides=request.overrides)
        return await api_keys.edit_key(self._editor, self._actor, record.id, patch, {record.revision})

    async def delete(self, record: KeyRead) -> None:
        """See `ApiKeys.delete`."""
        await api_keys.delete_key(self._editor, self._actor, record.id, {record.revision})


class KeysAtControlPlane:
    """API keys over the admin API. See `ApiKeys`. Its methods block and await nothing."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    async def create(self, request: KeyCreate) -> KeyMade:
        """See `ApiKeys.create`."""
        return self._plane.post("/api-keys", request, KeyMade)

    async def import_batch(self, request: KeyImportRequest) -> KeyImportResult:
        """See `ApiKeys.import_batch`."""
        return self._plane.post("/api-keys/import", request, KeyImportResult)

    async def page(self, key_filter: KeyFilter, limit: int, after: str | None) -> Page[KeyRead]:
        """See `ApiKeys.page`."""
        query = {"limit": limit, "after": after, **msgspec.structs.asdict(key_filter)}
        page = self._plane.read("/api-keys", query, KeyPage)
        return Page(page.items, page.next)

    async def revoke(self, record: KeyRead, request: RevokeRequest) -> KeyRead:
        """See `ApiKeys.revoke`."""
        return self._plane.post(f"/api-keys/{record.id}/revoke", request, KeyRead)

    async def rotate(self, record: KeyRead, grace_s: int) -> KeyRotated:
        """See `ApiKeys.rotate`."""
        return self._plane.post(f"/api-keys/{record.id}/rotate", RotateRequest(grace_s=grace_s), KeyRotated)

    async def override(self, record: KeyRead, request: OverridesRequest) -> KeyRead:
        """See `ApiKeys.override`."""
        return self._plane.replace(f"/api-keys/{record.id}/overrides", request, record.revision, KeyRead)

    async def delete(self, record: KeyRead) -> None:
        """See `ApiKeys.delete`."""
        self._plane.delete(f"/api-keys/{record.id}", record.revision)


def with_keys(
    config: Path | None,
    url: str | None,
    token_file: Path | None,
    tls: ClientTls,
    work: Callable[[ApiKeys], Coroutine[Any, Any, _T]],
) -> _T:
    """Run an operation on API keys, in the database or over the admin API.

    Args:
        url: URL of the control plane; None for the database.
        token_file: file with the control plane's token; None for the token of the settings.
        tls: certificates for an https URL.
        work: the operation; it awaits only methods of the keys.

    Raises:
        TidegateError: if the operation was rejected, or the server or the database does not answer.
    """
    if url is not None:
        # Keys are hashed here: only digests are sent.
        read_settings(config, has_token=token_file is not None)
    return with_either(
        ServerOptions(config, url, token_file, tls),
        "keys",
        lambda plane: work(KeysAtControlPlane(plane)),
        lambda catalog: work(KeysInCatalog(catalog, cli_actor())),
    )


async def find(keys: ApiKeys, reference: str) -> KeyRead:
    """Find an API key.

    Args:
        reference: its id, a unique prefix of the id with 6 digits or more, or the key itself.

    Raises:
        KeyNotFound: if it matches no key, or several.
        TidegateError: if the keys cannot be read.
    """
    prefixes = []
    if is_possible_key(reference):
        # First, also if it could be an id: a key of a policy file may consist of hex digits, and a key must not be sent.
        prefixes.append(hash_api_key(reference)[:24])
    if _ID_PREFIX.fullmatch(reference):
        prefixes.append(reference)
    if not prefixes:
        raise KeyNotFound(
            "that is neither an id (6 or more of its hex digits) nor an API key, unless it is mistyped: see 'tidegate keys list'"
        )
    for prefix in prefixes:
        found = (await keys.page(KeyFilter(id_prefix=prefix), 2, None)).items
        if len(found) > 1:
            raise KeyNotFound("several API keys have this prefix of the id: use more digits, see 'tidegate keys list'")
        if found:
            return found[0]
    raise KeyNotFound(
        "there is no such API key: give its id, 6 hex digits or more of the id, or the key itself; see 'tidegate keys list'"
    )


async def collect(keys: ApiKeys, key_filter: KeyFilter, limit: int, after: str | None) -> Page[KeyRead]:
    """List keys, page by page.

    Raises:
        TidegateError: if the keys cannot be read.
    """
    items: list[KeyRead] = []
    while True:
        page = await keys.page(key_filter, min(limit - len(items), MAX_PAGE), after)
        items += page.items
        after = page.next
        if after is None or not page.items or len(items) >= limit:
            return Page(items, after)
