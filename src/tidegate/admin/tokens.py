"""Tokens of operators: `tga_` and 40 random base62 characters. Only their digests are stored."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable
from typing import Any, Final

import msgspec
from sqlalchemy import Select, insert, select, update

from tidegate.admin.models import TokenMade, TokenRead
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import AuditedTransaction, NotFound
from tidegate.catalog.changes import NONE
from tidegate.catalog.sql.tables import admin_tokens
from tidegate.errors import BadRequest, CatalogError
from tidegate.policy.key_format import BASE62
from tidegate.policy.labels import SETTINGS_ACTOR, require_label
from tidegate.timestamps import now_us

TOKEN_PREFIX: Final = "tga_"
FIRST_TOKEN: Final = "first"
OPERATOR: Final = "operator"
VIEWER: Final = "viewer"

_SHARED_QUERY_S: Final = 0.05
_MAX_LIVE: Final = 100_000
_FORM: Final = re.compile(r"tga_[0-9A-Za-z]{40}", re.ASCII)


class Principal(msgspec.Struct, frozen=True):
    """The authenticated author of a request to the control plane.

    Args:
        subject: subject of the request limit; unique for each token.
    """

    name: str
    role: str
    subject: str


class KnownDigests:
    """Whether a digest is stored, with at most one concurrent query: for use while many wrong secrets arrive.

    Args:
        query: makes the query of all stored digests.
    """

    def __init__(self, editor: CatalogEditor, query: Callable[[], Select[Any]]) -> None:
        self._editor = editor
        self._query = query
        self._loading: asyncio.Future[frozenset[str]] | None = None
        self._one_query = asyncio.Lock()

    async def have(self, sha256: str) -> bool:
        """Whether a digest is stored.

        Raises:
            CatalogUnavailable: if the database does not answer.
        """
        if self._loading is None:
            self._loading = asyncio.ensure_future(self._load())
            self._loading.add_done_callback(_retrieve)
        return sha256 in await asyncio.shield(self._loading)

    async def _load(self) -> frozenset[str]:
        # All calls within the pause share the query, which starts after it and so finds every secret created before them.
        await asyncio.sleep(_SHARED_QUERY_S)
        async with self._one_query:
            self._loading = None
            async with self._editor.reading() as connection:
                return frozenset((await connection.execute(self._query())).scalars())


class TokenCheck:
    """Authenticates bearer tokens.

    Args:
        settings_token: the operator's token in the settings; None if there is none.
    """

    def __init__(self, editor: CatalogEditor, settings_token: str | None) -> None:
        self._editor = editor
        self._settings_sha256 = None if settings_token is None else digest_of(settings_token)
        self._live = KnownDigests(
            editor, lambda: select(admin_tokens.c.sha256).where(admin_tokens.c.revoked_at_us.is_(None)).limit(_MAX_LIVE)
        )

    async def principal(self, token: str) -> Principal | None:
        """The principal of a token.

        Returns:
            The principal; None if the token is unknown, expired or revoked.

        Raises:
            CatalogUnavailable: if the database does not answer.
        """
        sha256 = digest_of(token)
        if not self._is_of_settings(sha256) and _FORM.fullmatch(token) is None:
            return None
        return await self.principal_of_digest(sha256)

    async def principal_of_digest(self, sha256: str) -> Principal | None:
        """The principal of the token with a digest; see `principal`."""
        if self._is_of_settings(sha256):
            return Principal(SETTINGS_ACTOR, OPERATOR, SETTINGS_ACTOR)
        async with self._editor.reading() as connection:
            row = (await connection.execute(select(admin_tokens).where(admin_tokens.c.sha256 == sha256))).mappings().first()
        if row is None or not hmac.compare_digest(sha256, row["sha256"]) or row["revoked_at_us"] is not None:
            return None
        if row["expires_at_us"] is not None and row["expires_at_us"] <= now_us():
            return None
        return Principal(row["name"], row["role"], f"token {row['id']}")

    async def is_known(self, token: str) -> bool:
        """Whether a token may be valid, with at most one concurrent query: for use while many wrong tokens arrive.

        Returns:
            False if the token is unknown or revoked.

        Raises:
            CatalogUnavailable: if the database does not answer.
        """
        sha256 = digest_of(token)
        if self._is_of_settings(sha256):
            return True
        if _FORM.fullmatch(token) is None:
            return False
        return await self._live.have(sha256)

    def _is_of_settings(self, sha256: str) -> bool:
        return self._settings_sha256 is not None and hmac.compare_digest(sha256, self._settings_sha256)


async def create_token(editor: CatalogEditor, actor: str, name: str, role: str, expires_at_us: int | None = None) -> TokenMade:
    """Create a token.

    Args:
        name: name of its user in the audit log: 1 to 200 characters, unique among tokens that are not revoked.
        expires_at_us: µs since the epoch, None for never.

    Returns:
        The record, and the token itself, which no other result contains.

    Raises:
        BadRequest: if it would already be expired, or the name is not valid.
        CatalogError: if the name is in use: the audit log could not distinguish the two tokens.
        CatalogUnavailable: if the database does not answer.
    """
    if expires_at_us is not None and expires_at_us <= now_us():
        raise BadRequest(
            "expires_at is in the past: send a later time, or omit it for a token that never expires", field="expires_at"
        )
    require_label(name, "name", actor_like=True)
    async with editor.changing(actor) as transaction:
        # Without an index on the name, because tokens are few and rarely created. Requests look up the digest.
        live = select(admin_tokens.c.id).where(admin_tokens.c.name == name, admin_tokens.c.revoked_at_us.is_(None))
        other = await transaction.one(live)
        if other is not None:
            raise CatalogError(f"the token {other['id']} is named {name[:60]!r} already: choose another name")
        return await _insert_token(transaction, name, role, expires_at_us)


async def revoke_token(editor: CatalogEditor, actor: str, token_id: int) -> TokenRead:
    """Revoke a token. Its record is kept for the audit log.

    Raises:
        NotFound: if it does not exist.
        CatalogError: if it is revoked already.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.changing(actor) as transaction:
        row = await transaction.one(select(admin_tokens).where(admin_tokens.c.id == token_id))
        if row is None:
            raise NotFound(f"there is no token {token_id}: see GET /admin/v1/tokens")
        if row["revoked_at_us"] is not None:
            raise CatalogError(f"the token {token_id} is revoked already")
        transaction.touch(NONE)
        values = {"revoked_at_us": now_us()}
        await transaction.connection.execute(update(admin_tokens).where(admin_tokens.c.id == token_id).values(values))
        revoked = TokenRead.of_row({**row, **values})
        await transaction.audit("revoke", "token", str(token_id), TokenRead.of_row(row), revoked)
        return revoked


async def first_token(editor: CatalogEditor) -> str | None:
    """Create the token of the first operator, if no token was ever created.

    Returns:
        The token, which no other result contains; None if there is or was a token.

    Raises:
        CatalogUnavailable: if the database does not answer.
    """
    any_token = select(admin_tokens.c.id).limit(1)
    async with editor.reading() as connection:
        if (await connection.execute(any_token)).first() is not None:
            return None
    async with editor.changing(SETTINGS_ACTOR) as transaction:
        # Another instance may have created one while this one waited for the write lock.
        if await transaction.one(any_token) is not None:
            return None
        return (await _insert_token(transaction, FIRST_TOKEN, OPERATOR, None)).token


async def _insert_token(transaction: AuditedTransaction, name: str, role: str, expires_at_us: int | None) -> TokenMade:
    transaction.touch(NONE)
    token = TOKEN_PREFIX + "".join(secrets.choice(BASE62) for _ in range(40))
    values: dict[str, Any] = {
        "name": name,
        "sha256": digest_of(token),
        "role": role,
        "created_at_us": now_us(),
        "expires_at_us": expires_at_us,
    }
    token_id = (
        await transaction.connection.execute(insert(admin_tokens).values(values).returning(admin_tokens.c.id))
    ).scalar_one()
    record = TokenRead.of_row({**values, "id": token_id, "revoked_at_us": None})
    await transaction.audit("create", "token", str(token_id), None, record)
    return TokenMade(**dict(record), token=token)


def _retrieve(loading: asyncio.Future[frozenset[str]]) -> None:
    """Retrieve an error whose waiters were cancelled; asyncio would log it as never retrieved."""
    if not loading.cancelled():
        loading.exception()


def digest_of(token: str) -> str:
    """The digest under which a token is stored."""
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()
