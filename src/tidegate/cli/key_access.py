"""API keys as the commands reach them, in two ways that do the same: in the database, and over the admin API.

What is refused reads alike on both ways: its code and a sentence. An API key that a person names is hashed here, and only
its id goes on.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import msgspec

from tidegate.admin import api_keys
from tidegate.admin.lists import list_keys
from tidegate.admin.models import KeyCreate, KeyMade, KeyPage, KeyRead, KeyRotated, RevokeRequest, RotateRequest
from tidegate.admin.rules import CatalogEditor
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.paging import MAX_PAGE, Page
from tidegate.cli.client_tls import ClientTls
from tidegate.cli.common import with_catalog
from tidegate.cli.control_plane import ControlPlane
from tidegate.errors import BadRequest, CatalogError, CatalogUnavailable, PolicyError, SettingsError, TidegateError
from tidegate.policy.key_format import hash_api_key, is_possible_key
from tidegate.policy.labels import CLI_ACTOR

_ID_PREFIX: Final = re.compile(r"[0-9a-f]{6,24}", re.ASCII)
_MAX_ACTOR: Final = 200

_T = TypeVar("_T")


class KeyFilter(msgspec.Struct, frozen=True):
    """Which keys are listed; None for all.

    Args:
        tier: name of their tier.
        status: active, expired or revoked.
        name: contained in their name, in any case.
        id_prefix: what their ids begin with.
    """

    tier: str | None = None
    status: str | None = None
    name: str | None = None
    id_prefix: str | None = None


class KeyRefused(TidegateError):
    """The catalog refused what was asked; the message begins with its code, as the admin API's does."""

    code = "KEY_REFUSED"


class KeyNotMeant(TidegateError):
    """What was given names no API key, or several. It is not repeated: it may be the key itself."""

    code = "NOT_FOUND"


class ApiKeys(Protocol):
    """What can be done with API keys, on either way. Every method raises a TidegateError where it is refused."""

    async def create(self, request: KeyCreate) -> KeyMade:
        """Make a key.

        Raises:
            TidegateError: if there is no such tier.
        """

    async def page(self, key_filter: KeyFilter, limit: int, after: str | None) -> Page[KeyRead]:
        """A page of the list of keys, by id.

        Args:
            key_filter: which ones.
            limit: at most so many, 1 to 500.
            after: only those behind this id.

        Returns:
            The page.

        Raises:
            TidegateError: if the keys cannot be read.
        """

    async def revoke(self, record: KeyRead, request: RevokeRequest) -> KeyRead:
        """Revoke a key.

        Args:
            record: of the key.
            request: the reason.

        Returns:
            Its record now.

        Raises:
            TidegateError: if it is revoked already, or the policy file owns it.
        """

    async def rotate(self, record: KeyRead, grace_s: int) -> KeyRotated:
        """Replace a key by a new one of the same tier, name, end and limits.

        Args:
            record: of the old key.
            grace_s: how long that still works, s; with 0 it is revoked now.

        Returns:
            The new key, this once, and both records.

        Raises:
            TidegateError: if the old key is revoked or expired, or the policy file owns it.
        """

    async def delete(self, record: KeyRead) -> None:
        """Remove the record of a key.

        Args:
            record: as it was read.

        Raises:
            TidegateError: if the key still works, was changed since, or the policy file owns it.
        """


class KeysInCatalog:
    """API keys in the database. See `ApiKeys`.

    Args:
        catalog: open.
        actor: who asks, for the audit log.
    """

    def __init__(self, catalog: SqlCatalog, actor: str) -> None:
        # Nothing in this process remembers what a change touched; the others are told by the database.
        self._editor = CatalogEditor(catalog, lambda *_: None)
        self._actor = actor

    async def create(self, request: KeyCreate) -> KeyMade:
        """See `ApiKeys.create`."""
        return await api_keys.create_key(self._editor, self._actor, request)

    async def page(self, key_filter: KeyFilter, limit: int, after: str | None) -> Page[KeyRead]:
        """See `ApiKeys.page`."""
        return await list_keys(self._editor, limit, after, **msgspec.structs.asdict(key_filter))

    async def revoke(self, record: KeyRead, request: RevokeRequest) -> KeyRead:
        """See `ApiKeys.revoke`."""
        return await api_keys.revoke_key(self._editor, self._actor, record.id, request)

    async def rotate(self, record: KeyRead, grace_s: int) -> KeyRotated:
        """See `ApiKeys.rotate`."""
        return await api_keys.rotate_key(self._editor, self._actor, record.id, grace_s)

    async def delete(self, record: KeyRead) -> None:
        """See `ApiKeys.delete`."""
        await api_keys.delete_key(self._editor, self._actor, record.id, {record.revision})


class KeysAtControlPlane:
    """API keys over the admin API. See `ApiKeys`. Its methods block, and wait for nothing else.

    Args:
        plane: the control plane.
    """

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    async def create(self, request: KeyCreate) -> KeyMade:
        """See `ApiKeys.create`."""
        return self._plane.post("/api-keys", request, KeyMade)

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
    """Do something with API keys, in the database or over the admin API.

    Args:
        config: the file given with `--config`.
        url: of the control plane; None for the database.
        token_file: a file with the control plane's token; None for the token of the settings.
        tls: certificates for an https URL.
        work: what to do. It awaits nothing but the keys' methods.

    Returns:
        What the work returned.

    Raises:
        TidegateError: whatever was refused or could not be reached.
    """
    if url is not None:
        return run_at_once(work(KeysAtControlPlane(ControlPlane.at(url, token_file, config, tls))))
    if token_file is not None:
        raise SettingsError("--token-file is for --url, without which the database is used: give both, or neither")
    if tls != ClientTls():
        raise SettingsError("--ca, --cert and --key are for --url, without which the database is used: add --url")

    async def in_catalog(catalog: SqlCatalog) -> _T:
        with refusals_as_over_the_api():
            return await work(KeysInCatalog(catalog, cli_actor()))

    return with_catalog(config, in_catalog)


async def find(keys: ApiKeys, meant: str) -> KeyRead:
    """The API key that a person means.

    Args:
        keys: on either way.
        meant: its id, a beginning of the id of 6 digits or more that only it has, or the key itself.

    Returns:
        Its record.

    Raises:
        KeyNotMeant: if no key or several are meant.
        TidegateError: if the keys cannot be read.
    """
    beginnings = []
    if is_possible_key(meant):
        # First, also where it looks like an id: a key of a policy file may be all hex digits, and a key must not go on as it is.
        beginnings.append(hash_api_key(meant)[:24])
    if _ID_PREFIX.fullmatch(meant):
        beginnings.append(meant)
    if not beginnings:
        raise KeyNotMeant(
            "that is neither an id (6 hex digits or more of it) nor an API key, unless it is mistyped: see 'tidegate keys list'"
        )
    for beginning in beginnings:
        found = (await keys.page(KeyFilter(id_prefix=beginning), 2, None)).items
        if len(found) > 1:
            raise KeyNotMeant("the ids of several API keys begin with that: give more of the id, see 'tidegate keys list'")
        if found:
            return found[0]
    raise KeyNotMeant(
        "there is no such API key: give its id, 6 hex digits or more of the id, or the key itself; see 'tidegate keys list'"
    )


async def collect(keys: ApiKeys, key_filter: KeyFilter, limit: int, after: str | None) -> Page[KeyRead]:
    """List keys, page by page.

    Args:
        keys: on either way.
        key_filter: which ones.
        limit: at most so many, 1 or more.
        after: only those behind this id.

    Returns:
        All of them as one page.

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


def run_at_once(work: Coroutine[Any, Any, _T]) -> _T:
    """Run what never waits for an event loop without one: under a loop, Ctrl-C would wait for the answer that does not come."""
    try:
        work.send(None)
    except StopIteration as done:
        result: _T = done.value
        return result
    raise AssertionError("the work waits for an event loop")


@contextlib.contextmanager
def refusals_as_over_the_api() -> Iterator[None]:
    """Raise what the catalog refuses as `KeyRefused`, with the code that the admin API sends."""
    try:
        yield
    except (CatalogError, BadRequest, PolicyError, CatalogUnavailable) as error:
        raise KeyRefused(f"{error.code}: {error.message}") from error


def cli_actor() -> str:
    """The name in the audit log of whoever runs this command."""
    return f"{CLI_ACTOR}{_user()}"[:_MAX_ACTOR]


def _user() -> str:
    if sys.platform == "win32":
        return getpass.getuser()
    import pwd

    # The account that runs this, not LOGNAME or USER: the audit log is not to say what anyone may export.
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's user has a number and no name
        return str(os.geteuid())
